"""Who serves, who does not and why; imports stay light."""

import importlib.util
import inspect
import re
import sys

import pytest
import torch

import pyseq
from pyseq import info, ops
from pyseq.kernels import _cpu
from pyseq.ops import _backend
from pyseq.ops._backend import BACKENDS, OPS, Backends, Explanation, explain
from pyseq.testing import cpu_level, script
from pyseq.testing.chain import Chain, chain, recorded_paths


def small() -> Chain:
    return chain(2, 3, 4)


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    problem = small()
    told = explain(ops.crf_nll, problem.emissions, problem.transitions, problem.tags)
    assert pyseq.explain is explain
    assert isinstance(told, Explanation)
    assert tuple(told) == BACKENDS
    assert told["reference"] == told["numba"] == told["cpp"] == []
    assert told["triton"] == ["tensors are on cpu, triton needs cuda (or TRITON_INTERPRET=1, for tests)"]
    assert told.chosen == "cpp"
    lines = str(told).splitlines()
    assert [line.split()[0] for line in lines] == list(BACKENDS)
    assert lines[BACKENDS.index("cpp")].endswith("chosen by auto")
    assert lines[BACKENDS.index("numba")].endswith("available")
    assert explain(ops.viterbi, emissions=problem.emissions).chosen == "cpp"


def test_explain_serves_every_public_op_and_needs_its_tensors() -> None:
    public = {op for name in ops.__all__ if inspect.isfunction(op := getattr(ops, name)) and name != "explain"}
    assert public - {ops.straight_through} == set(OPS)  # which has no kernel
    with pytest.raises(TypeError, match=r"explain needs a function of pyseq\.ops, got"):
        explain(torch.add, torch.ones(1))
    with pytest.raises(TypeError, match=r"explain\(crf_nll, \.\.\.\) needs the tensors"):
        explain(ops.crf_nll)


def test_auto_takes_the_first_of_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """cpp, then numba, then the reference: each disappears in turn. With all inputs at hand, an op's own limits too."""
    backends: Backends = ops.crf_nll.backends  # type: ignore[attr-defined]
    inputs = small().inputs()
    assert backends.order == {"cpu": ("cpp", "numba"), "cuda": ("triton",)}
    gone: list[str] = []
    plain = Backends.reasons
    monkeypatch.setattr(Backends, "reasons", lambda self, name, x: ["gone"] if name in gone else plain(self, name, x))
    for expected in ("cpp", "numba", "reference"):
        assert backends.choose("auto", inputs) == expected
        gone += [expected] if expected != "reference" else []
    with pytest.raises(ValueError, match="backend 'numba' cannot serve: gone"):
        backends.choose("numba", inputs)
    assert backends.choose("auto", small().to("meta").inputs()) == "reference"


def test_use_backend_says_what_auto_means() -> None:
    """As a context, as a setter, for eager calls and for explain; not for a backend asked for by name."""
    problem = small()
    for backend in ("numba", "cpp"):
        other = {"numba": "cpp", "cpp": "numba"}[backend]
        with pyseq.use_backend(backend), recorded_paths("numba") as numba, recorded_paths("cpp") as cpp:  # type: ignore[arg-type]
            problem(ops.crf_log_partition, "auto")
            assert (len(numba), len(cpp)) == ((1, 0) if backend == "numba" else (0, 1))
            problem(ops.crf_log_partition, other)
            assert (len(numba), len(cpp)) == (1, 1)
            assert explain(ops.viterbi, problem.emissions).chosen == backend
    before = explain(ops.viterbi, problem.emissions).chosen
    undo = pyseq.use_backend("numba")
    assert explain(ops.viterbi, problem.emissions).chosen == "numba"
    undo.__exit__()
    for _ in range(2):  # one object, again and again, and after another one
        with undo:
            assert explain(ops.viterbi, problem.emissions).chosen == "numba"
        assert explain(ops.viterbi, problem.emissions).chosen == before
    with pytest.raises(ValueError, match="reduction must be"), pyseq.use_backend("reference"):
        ops.crf_nll(problem.emissions, problem.transitions, problem.tags, reduction="no")  # type: ignore[arg-type]
    assert explain(ops.viterbi, problem.emissions).chosen == before
    with pytest.raises(ValueError, match="backend must be 'auto' or one of reference, numba, cpp, triton, got 'cuda'"):
        pyseq.use_backend("cuda")  # type: ignore[arg-type]


def test_the_environment_is_read_when_pyseq_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the module, imported under each setting, says what "auto" then means."""
    lead = torch.zeros(1, 1, 2)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    wrong = "PYSEQ_BACKEND must be 'auto' or one of reference, numba, cpp, triton, got 'nonsense'"
    late = "PYSEQ_BACKEND 'triton' cannot serve: tensors are on cpu"
    for value, chosen, refusal in (
        ("", "cpp", ""), ("numba", "numba", ""), ("nonsense", "", wrong), ("triton", "", late)
    ):  # fmt: skip
        monkeypatch.setenv("PYSEQ_BACKEND", value)
        again = importlib.util.module_from_spec(_backend.__spec__)  # type: ignore[arg-type]
        monkeypatch.setitem(sys.modules, again.__name__, again)  # where dataclasses look
        _backend.__spec__.loader.exec_module(again)  # type: ignore[union-attr]
        monkeypatch.setitem(sys.modules, again.__name__, _backend)
        with monkeypatch.context() as patch:
            patch.setattr(_backend, "settings", again.settings)
            told = explain(ops.viterbi, lead)
            assert (told.chosen, told.refusal[: len(refusal)]) == (chosen, refusal)
            assert refusal in info.report()
            assert str(told).splitlines()[-1].startswith(refusal)
            if refusal:
                with pytest.raises(ValueError, match=re.escape(refusal)):
                    ops.viterbi(lead, torch.zeros(2, 2))


def test_triton_says_when_it_is_too_old_for_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for version, reason in (("3.7.1", "triton 3.7.1 cannot compile"), ("3.8.0", ""), ("3.10.0", "")):
        monkeypatch.setattr("importlib.metadata.version", lambda _, version=version: version)
        reasons = _backend.environment("chain", "triton", "cuda")
        assert bool(reasons) == bool(reason)
        assert not reason or reasons[0].startswith(reason)
    monkeypatch.setattr(torch.version, "hip", None)
    assert _backend.environment("chain", "triton", "cuda") == []


def test_the_cpu_level_is_one_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    with cpu_level(2):
        assert "kernels use the platform's baseline" in info.report()
    monkeypatch.setenv("PYSEQ_CPU_LEVEL", "avx2")
    with pytest.raises(ValueError, match="PYSEQ_CPU_LEVEL must be 2, 3 or 4, or 0 for the best, got 'avx2'"):
        _cpu._wanted_level()


def test_a_named_backend_serves_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small()
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .* got 'cuda'"):
        problem(ops.crf_nll, "cuda")
    with pytest.raises(ValueError, match="got None"):
        problem(ops.crf_nll, None)  # type: ignore[arg-type]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="'triton' cannot serve: triton serves at most 1024 tags, got 1025"):
        ops.crf_log_partition(torch.empty(1, 1, 1025), torch.empty(1025, 1025), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for op in (ops.crf_nll, ops.crf_marginals, ops.viterbi):
        with pytest.raises(ValueError, match="'triton' cannot serve: tensors are on cpu, triton needs cuda"):
            problem(op, "triton")
    meta = problem.to("meta")
    for backend in ("numba", "cpp"):
        with pytest.raises(ValueError, match=f"'{backend}' cannot serve: tensors are on meta, {backend} needs cpu"):
            meta(ops.crf_log_partition, backend)


def test_import_is_cold() -> None:
    """No backend's compiler, no plotting, until a call needs it; the first cpp call pulls in neither."""
    out = script(
        """
import sys
import pyseq, pyseq.ops
heavy = ("numba", "triton", "llvmlite", "matplotlib", "hypothesis", "pytest")
print([m for m in heavy if m in sys.modules])
import torch
pyseq.ops.crf_nll(torch.ones(1, 2, 3), torch.ones(3, 3), torch.zeros(1, 2).long())
print([m for m in heavy if m in sys.modules and m != "triton"])
print("pyseq.nn" in sys.modules, pyseq.nn.CRF(3), hasattr(pyseq, "mm"))
"""
    )
    assert out.splitlines() == ["[]", "[]", "False CRF(num_tags=3) False"]


def test_an_extension_of_another_version() -> None:
    """Left in an editable install after an update: it does not serve, and says what to do."""
    out = script(
        """
import sys, types
sys.modules["pyseq._C"] = types.ModuleType("pyseq._C")
import torch
from pyseq import explain, ops
print(explain(ops.viterbi, torch.ones(1, 1, 1)))
"""
    )
    assert "the compiled extension is older than pyseq; reinstall pyseq" in out
    assert "chosen by auto" in next(line for line in out.splitlines() if line.startswith("numba"))


def test_reference_needs_torch_alone() -> None:
    """numba, triton and the extension unimportable: auto falls to the reference, the others say what is missing."""
    out = script(
        """
import sys
for name in ("numba", "triton", "pyseq._C"):
    sys.modules[name] = None
import torch
from pyseq import explain, ops
x = torch.ones(1, 2, 3, requires_grad=True)
ops.crf_nll(x, torch.ones(3, 3), torch.zeros(1, 2).long()).sum().backward()
print(bool(x.grad.abs().sum() > 0))
print(explain(ops.crf_nll, x))
try:
    ops.crf_log_partition(x, torch.ones(3, 3), backend="numba")
except ValueError as error:
    print(error)
"""
    )
    trained, *lines, refusal = out.splitlines()
    assert trained == "True"
    assert "chosen by auto" in next(line for line in lines if line.startswith("reference"))
    assert any("numba is not installed" in line for line in lines)
    assert any("the compiled extension is missing" in line for line in lines)
    assert refusal.startswith("backend 'numba' cannot serve")
