"""What works with `crf(...)` works with every method: hooks, pruning, norms, parametrizations, two processes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pyseq.nn import CRF, crf_parameter_groups

ROOM = "chain"


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 5, generator=generator) < 0.8
    return torch.randn(4, 5, 3, generator=generator), torch.randint(3, (4, 5), generator=generator), mask


def call(crf: CRF, method: str) -> Any:
    emissions, tags, mask = example()
    return crf.nll(emissions, tags, mask) if method == "nll" else getattr(crf, method)(emissions, mask)


@pytest.mark.parametrize("method", ["nll", "decode", "viterbi", "marginals"])
def test_hooks_see_every_method_once(method: str) -> None:
    """Also of a subclass; they may change what comes out. `compute` is the method."""
    (emissions, tags, mask), seen = example(), []
    crf = type("Head", (CRF,), {})(3, batch_first=True)
    wanted = call(crf, method)
    given: tuple[Any, ...] = (emissions, tags, mask, "mean") if method == "nll" else (emissions, None, mask)
    assert str(crf(*given, compute=method)) == str(wanted)
    crf.register_forward_pre_hook(lambda module, args: seen.append(("before", args[0].shape)))
    crf.register_forward_hook(lambda module, args, output: seen.append(("after", type(output))))
    assert str(call(crf, method)) == str(wanted)
    assert seen == [("before", (4, 5, 3)), ("after", type(wanted))]
    crf.register_forward_hook(lambda module, args, output: "changed")
    assert call(crf, method) == "changed"


def test_compute_and_tags_must_fit() -> None:
    emissions, tags, mask = example()
    with pytest.raises(ValueError, match=r"compute must be .log_likelihood., .nll., .* got .loss."):
        CRF(3, batch_first=True)(emissions, tags, compute="loss")
    with pytest.raises(TypeError, match="compute='viterbi' takes no tags; give None for them, then the mask"):
        CRF(3, batch_first=True)(emissions, mask, compute="viterbi")


CHANGES: dict[str, Callable[[CRF], Any]] = {
    "prune": lambda crf: prune.random_unstructured(crf, "transitions", 0.3),
    "weight_norm by hooks": lambda crf: torch.nn.utils.weight_norm(crf, "transitions"),
    "spectral_norm by hooks": lambda crf: torch.nn.utils.spectral_norm(crf, "transitions"),
    "weight_norm": lambda crf: parametrizations.weight_norm(crf, "transitions"),
    "orthogonal": lambda crf: parametrizations.orthogonal(crf, "transitions"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_training_through_nll_is_training_through_forward(change: str) -> None:
    """Three steps; what recomputes transitions before each forward does so for the loss that the README leads with."""
    crfs = []
    for _ in range(2):  # some copies are no leaves
        torch.manual_seed(0)
        crfs.append(CRF(3, batch_first=True))
        CHANGES[change](crfs[-1])
    first, second = crfs
    assert first.state_dict().keys() != CRF(3).state_dict().keys()
    emissions, tags, mask = example()
    for _ in range(3):
        for crf, loss in ((first, first.nll), (second, lambda *args, **kw: -second(*args, **kw))):
            crf.zero_grad()
            loss(emissions, tags, mask, reduction="sum").backward()
            torch.optim.SGD(crf.parameters(), lr=0.1).step()
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(x, y)
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in first.parameters())
    encoder = nn.Linear(4, 3)
    rest, heads = crf_parameter_groups(nn.Sequential(encoder, first), lr=1e-5)
    assert {id(x) for x in heads["params"]} == {id(x) for x in first.parameters()}
    assert {id(x) for x in rest["params"]} == {id(x) for x in encoder.parameters()}


@pytest.mark.parametrize(
    ("optimizer", "decay", "spoils"),
    [
        *((name, 0.01, True) for name in ("SGD", "Adam", "RMSprop", "Adagrad", "RAdam")),
        ("Adafactor", 0.0, True),
        ("Adam", 0.0, False),
        ("AdamW", 0.01, False),
    ],
)
def test_what_turns_a_trained_minus_infinity_into_nan(optimizer: str, decay: float, spoils: bool) -> None:
    """What the docstring warns of, of averages too; Adam without decay and AdamW keep it."""
    emissions, tags, mask = example()
    crf = CRF(3, batch_first=True)
    nn.init.constant_(crf.transitions[0, 1], -torch.inf)
    chosen = getattr(torch.optim, optimizer)(crf.parameters(), lr=0.1, weight_decay=decay)
    for _ in range(2):
        chosen.zero_grad()
        crf.nll(emissions, torch.zeros_like(tags), mask).backward()
        chosen.step()
    assert bool(crf.transitions[0, 1].isnan()) == spoils
    assert bool((crf.viterbi(emissions)[1] == -1).all()) == spoils
    for average in (None, torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)):
        averaged: Any = torch.optim.swa_utils.AveragedModel(crf, multi_avg_fn=average)
        for _ in range(2):
            averaged.update_parameters(crf)
        assert (averaged.module.viterbi(emissions)[1] == -1).all()


def test_two_processes(tmp_path: Path) -> None:
    """Gradients of FSDP2 and of DDP over two gloo processes are those of one process with the joined batch."""
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, str(script), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_subclass_with_a_forward_of_its_own() -> None:
    """As torchcrf's users write it; methods neither meet its signature nor call themselves."""

    class Twice(CRF):
        def forward(self, emissions: Tensor, tags: Tensor) -> Tensor:  # type: ignore[override]
            return self.nll(emissions, tags) - super().forward(emissions, tags, reduction="mean")  # type: ignore[operator]

    emissions, tags, mask = example()
    plain, crf = CRF(3, batch_first=True), Twice(3, batch_first=True)
    crf.load_state_dict(plain.state_dict())
    assert torch.equal(crf(emissions, tags), 2 * plain.nll(emissions, tags))
    assert crf.decode(emissions, mask) == plain.decode(emissions, mask)
    assert torch.equal(crf.nll(emissions, tags, mask), plain.nll(emissions, tags, mask))
