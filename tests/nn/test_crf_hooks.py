"""What works with `crf(...)` works with every method: hooks, pruning, norms, parametrizations, two processes."""

import copy
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
METHODS = ("nll", "decode", "viterbi", "marginals")


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 5, generator=generator) < 0.8
    return torch.randn(4, 5, 3, generator=generator), torch.randint(3, (4, 5), generator=generator), mask


def call(crf: CRF, method: str) -> Any:
    emissions, tags, mask = example()
    return crf.nll(emissions, tags, mask) if method == "nll" else getattr(crf, method)(emissions, mask)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_see_every_method_once(method: str) -> None:
    """And may change what goes in and what comes out."""
    crf, seen = CRF(3, batch_first=True), []
    wanted = call(crf, method)
    crf.register_forward_pre_hook(lambda module, args: seen.append(("before", args[0].shape)))
    crf.register_forward_hook(lambda module, args, output: seen.append(("after", type(output))))
    found = call(crf, method)
    assert seen == [("before", (4, 5, 3)), ("after", type(wanted))]
    assert str(found) == str(wanted)
    crf.register_forward_hook(lambda module, args, output: "changed")
    assert call(crf, method) == "changed"


@pytest.mark.parametrize("method", METHODS)
def test_compute_is_the_method(method: str) -> None:
    emissions, tags, mask = example()
    crf = CRF(3, batch_first=True)
    labels = tags if method == "nll" else None
    reduction = {"reduction": "mean"} if method == "nll" else {}
    assert str(crf(emissions, labels, mask, **reduction, compute=method)) == str(call(crf, method))
    with pytest.raises(ValueError, match=r"compute must be .log_likelihood., .nll., .* got .loss."):
        crf(emissions, tags, compute="loss")
    for loss in ({}, {"compute": "nll"}):
        with pytest.raises(TypeError, match="tags must be a tensor, got NoneType"):
            crf(emissions, None, **loss)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'tags'"):
        crf(emissions)
    with pytest.raises(TypeError, match="compute='viterbi' takes no tags; give None for them, then the mask"):
        crf(emissions, mask, compute="viterbi")


def pruned(crf: CRF) -> CRF:
    return prune.random_unstructured(crf, "transitions", 0.3)  # type: ignore[no-any-return]


CHANGES: dict[str, Callable[[CRF], Any]] = {
    "prune": pruned,
    "weight_norm by hooks": lambda crf: torch.nn.utils.weight_norm(crf, "transitions"),
    "spectral_norm by hooks": lambda crf: torch.nn.utils.spectral_norm(crf, "transitions"),
    "weight_norm": lambda crf: parametrizations.weight_norm(crf, "transitions"),
    "orthogonal": lambda crf: parametrizations.orthogonal(crf, "transitions"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_training_through_nll_is_training_through_forward(change: str) -> None:
    """Three steps; what recomputes transitions before each forward does so for the loss that the README leads with."""
    torch.manual_seed(0)
    first = CRF(3, batch_first=True)
    CHANGES[change](first)
    second = copy.deepcopy(first) if "hooks" not in change and change != "prune" else None
    if second is None:  # whose copies are no leaves
        torch.manual_seed(0)
        second = CRF(3, batch_first=True)
        CHANGES[change](second)
        second.load_state_dict(first.state_dict())
    emissions, tags, mask = example()
    for _ in range(3):
        for crf, loss in ((first, first.nll), (second, lambda *args, **kw: -second(*args, **kw))):
            crf.zero_grad()
            loss(emissions, tags, mask, reduction="sum").backward()
            torch.optim.SGD(crf.parameters(), lr=0.1).step()
    before = CRF(3, batch_first=True).state_dict().keys()
    assert first.state_dict().keys() != before
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(x, y)
    assert any(x.grad.abs().max() > 0 for x in first.parameters() if x.grad is not None)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_parameter_groups_keep_what_was_a_crfs_own(change: str) -> None:
    encoder, crf = nn.Linear(4, 3), CRF(3)
    CHANGES[change](crf)
    rest, heads = crf_parameter_groups(nn.Sequential(encoder, crf), lr=1e-5)
    assert {id(x) for x in heads["params"]} == {id(x) for x in crf.parameters()}
    assert {id(x) for x in rest["params"]} == {id(x) for x in encoder.parameters()}
    assert heads["lr"] == 1e-3


def forbid(crf: CRF) -> None:
    with torch.no_grad():
        crf.transitions[0, 1] = -torch.inf


DECAY = {"weight_decay": 0.01}
SPOILERS: list[tuple[Any, dict[str, float]]] = [
    *((optim, DECAY) for optim in (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad)),
    (torch.optim.RAdam, DECAY),
    (torch.optim.Adafactor, {}),
]


@pytest.mark.parametrize(("optimizer", "options"), [*SPOILERS, (torch.optim.Adam, {}), (torch.optim.AdamW, DECAY)])
def test_what_turns_a_trained_minus_infinity_into_nan(optimizer: Any, options: dict[str, float]) -> None:
    """What the docstring warns of; Adam without decay and AdamW keep it. The same in emissions survives them all."""
    emissions, tags, mask = example()
    tags[:, 0] = 0
    forbidden = emissions.clone()
    forbidden[:, 0, 1] = -torch.inf
    in_transitions, in_emissions = CRF(3, batch_first=True), CRF(3, batch_first=True)
    forbid(in_transitions)
    for crf, f, y in ((in_transitions, emissions, torch.zeros_like(tags)), (in_emissions, forbidden, tags)):
        chosen = optimizer(crf.parameters(), lr=0.1, **options)
        for _ in range(2):
            chosen.zero_grad()
            crf.nll(f, y, mask).backward()
            chosen.step()
    spoiled = (optimizer, options) in SPOILERS
    assert bool(in_transitions.transitions[0, 1].isnan()) == spoiled
    assert bool((in_transitions.viterbi(emissions)[1] == -1).all()) == spoiled
    assert all(x.isfinite().all() for x in in_emissions.parameters())
    assert (in_emissions.viterbi(forbidden)[1][:, 0] != 1).all()


@pytest.mark.parametrize("average", [None, torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)])
def test_averages_of_weights_turn_minus_infinity_into_nan(average: Any) -> None:
    crf = CRF(3, batch_first=True)
    forbid(crf)
    averaged: Any = torch.optim.swa_utils.AveragedModel(crf, multi_avg_fn=average)
    for _ in range(2):
        averaged.update_parameters(crf)
    assert (averaged.module.viterbi(example()[0])[1] == -1).all()


def test_two_processes(tmp_path: Path) -> None:
    """Gradients of FSDP2 and of DDP over two gloo processes are those of one process with the joined batch."""
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, str(script), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_subclass_with_a_forward_of_its_own() -> None:
    """As torchcrf's users write it; methods neither meet its signature nor call themselves."""

    class Loss(CRF):
        def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return -super().forward(emissions, tags, mask, reduction="mean")  # type: ignore[operator]

    class Again(CRF):
        def forward(self, emissions: Tensor, tags: Tensor) -> Tensor:  # type: ignore[override]
            return self.nll(emissions, tags)

    emissions, tags, mask = example()
    plain = CRF(3, batch_first=True)
    for kind in (Loss, Again):
        crf = kind(3, batch_first=True)
        crf.load_state_dict(plain.state_dict())
        assert torch.equal(crf(emissions, tags), plain.nll(emissions, tags))
        assert crf.decode(emissions, mask) == plain.decode(emissions, mask)
        assert torch.equal(crf.nll(emissions, tags, mask), plain.nll(emissions, tags, mask))
