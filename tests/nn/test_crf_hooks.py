"""What works with `crf(...)` works with every method: hooks, pruning, norms, parametrizations, two processes."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pyseq.nn import CRF, crf_parameter_groups

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
            with torch.no_grad():
                for x in crf.parameters():
                    x -= 0.1 * x.grad
    before = CRF(3, batch_first=True).state_dict().keys()
    assert first.state_dict().keys() != before
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(x, y)
    assert any(x.grad.abs().max() > 0 for x in first.parameters() if x.grad is not None)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_parameter_groups_keep_what_was_a_crfs_own(change: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), CRF(3))
    CHANGES[change](model[1])
    rest, heads = crf_parameter_groups(model, lr=1e-5)
    assert {id(x) for x in heads["params"]} == {id(x) for x in model[1].parameters()}
    assert {id(x) for x in rest["params"]} == {id(x) for x in model[0].parameters()}
    assert heads["lr"] == 1e-3


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_decay_turns_a_trained_minus_infinity_into_nan(optimizer: Any) -> None:
    """What the docstring warns of; in emissions the same prohibition survives."""
    emissions, tags, mask = example()
    crf = CRF(3, batch_first=True)
    with torch.no_grad():
        crf.transitions[0, 1] = -torch.inf
    chosen = optimizer(crf.parameters(), lr=0.1, weight_decay=0.01)
    for _ in range(2):
        chosen.zero_grad()
        crf.marginals(emissions, mask).square().sum().backward()
        chosen.step()
    assert crf.transitions[0, 1].isnan()
    assert (crf.viterbi(emissions)[1] == -1).all()
    crf.reset_parameters()
    forbidden = emissions.clone()
    forbidden[:, 0, 1] = -torch.inf
    tags[:, 0] = 0
    chosen = optimizer(crf.parameters(), lr=0.1, weight_decay=0.01)
    for _ in range(2):
        chosen.zero_grad()
        crf.nll(forbidden, tags, mask).backward()
        chosen.step()
    assert all(x.isfinite().all() for x in crf.parameters())
    assert (crf.viterbi(forbidden)[1][:, 0] != 1).all()


WORLD = """
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from pyseq.nn import CRF

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.crf = nn.Linear(4, 3), CRF(3, batch_first=True)
    def forward(self, x, tags):
        return self.crf.nll(self.encoder(x), tags, reduction="mean")

def data():
    torch.manual_seed(1)
    return torch.randn(6, 5, 4), torch.randint(3, (6, 5))

def work(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    x, tags = data()
    whole = Net()
    whole(x, tags).backward()
    mine = slice(3 * rank, 3 * rank + 3)
    sharded = Net()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(sharded.crf, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(x[mine], tags[mine]).backward()
    assert all(type(p).__name__ == "DTensor" for p in sharded.crf.parameters())
    for p, q in zip(sharded.parameters(), whole.parameters()):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad)
    with torch.no_grad():
        emissions = whole.encoder(x[mine])
    for method in ("viterbi", "marginals", "decode"):
        got, right = (str(getattr(net.crf, method)(emissions)) for net in (sharded, whole))
        assert got == right, (method, got, right)
    crf = DistributedDataParallel(CRF(3, batch_first=True))
    crf.module.load_state_dict(whole.crf.state_dict())
    crf(emissions, tags[mine], reduction="mean", compute="nll").backward()
    alone = CRF(3, batch_first=True)
    alone.load_state_dict(whole.crf.state_dict())
    alone.nll(whole.encoder(x).detach(), tags).backward()
    for p, q in zip(crf.parameters(), alone.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    dist.destroy_process_group()

if __name__ == "__main__":
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    mp.spawn(work, (port,), nprocs=2)
    print("served")
"""


def test_two_processes(tmp_path: Any) -> None:
    """Gradients of FSDP2 and of DDP over two gloo processes are those of one process with the joined batch."""
    script = tmp_path / "world.py"
    script.write_text(WORLD)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "served"
