"""The MEMM layer: the interface of the CRF layer over the MEMM ops."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyseq import ops
from pyseq.nn import CRF, MEMM, crf_parameter_groups, tag_constraints

ROOM = "chain"
K = 4
WAYS = [*itertools.product(("both", "forward", "backward"), ("sum", "mean"), (None, 2))]


def made(batch_first: bool = True, **options: Any) -> MEMM:
    torch.manual_seed(0)
    memm = MEMM(K, batch_first, **options)
    for parameter in memm.parameters():
        nn.init.normal_(parameter)
    return memm


def batch(batch_first: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.rand(3, 5) < 0.7
    given = torch.randn(3, 5, K), torch.randint(K, (3, 5)), mask
    emissions, tags, mask = (x if batch_first else x.transpose(0, 1).contiguous() for x in given)
    return emissions, tags, mask


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("direction", "variant", "rank"), WAYS)
def test_methods_are_the_ops(direction: Any, variant: Any, rank: int | None, batch_first: bool) -> None:
    memm = made(batch_first, direction=direction, variant=variant, rank=rank)
    f, tags, mask = batch(batch_first)
    first, y, live = (x if batch_first else x.transpose(0, 1) for x in (f, tags, mask))
    scores = memm.transitions if rank is None else (memm.left, memm.right)
    words: dict[str, Any] = {"direction": direction, "variant": variant}
    nll = ops.memm_nll(first, scores, y, live, **words)
    assert torch.equal(memm.nll(f, tags, mask, "none"), nll)
    assert torch.equal(memm(f, tags, mask), -nll.sum())
    assert torch.equal(memm.nll(f, tags, mask), nll.mean())
    assert torch.equal(memm.nll(f, tags, mask, "token_mean"), nll.sum() / mask.sum())
    best, path = ops.memm_viterbi(first, scores, live, **words)
    found = memm.viterbi(f, mask.to(torch.uint8))
    assert torch.equal(found[0], best)
    assert torch.equal(found[1], path if batch_first else path.transpose(0, 1))
    assert memm.decode(f, mask) == [p[m].tolist() for p, m in zip(path, live, strict=True)]
    assert memm.decode(f, mask, n_best=2)[0][0] == memm.decode(f, mask)[0]
    assert memm.viterbi(f, mask, n_best=3)[1].shape == (3, 3, 5)
    if direction == "both":
        with pytest.raises(ValueError, match="marginals are of one direction"):
            memm.marginals(f, mask)
    else:
        sums = memm.marginals(f, mask).sum(2)
        torch.testing.assert_close(sums, mask.float())


@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
def test_unknown_and_absent_labels(direction: Any) -> None:
    """Unknown ones sum the probability of every label, in each direction; against all paths."""
    memm = made(direction=direction)
    f, tags, mask = batch()
    tags = tags.masked_fill(torch.rand(3, 5) < 0.4, -100)
    found = memm.nll(f, tags, mask, "none", ignored="unknown")
    wanted = torch.zeros(3)
    sides = ("forward", "backward") if direction == "both" else (direction,)
    for b, side in itertools.product(range(3), sides):
        open_ = [[y] if y >= 0 else range(K) for y in tags[b, mask[b]].tolist()]
        total = torch.tensor(0.0)
        for path in itertools.product(*open_):
            y = torch.zeros(5, dtype=torch.int64)
            y[mask[b]] = torch.tensor(path, dtype=torch.int64)
            scores = f[b : b + 1], memm.transitions, y[None], mask[b : b + 1]
            total = total + (-ops.memm_nll(*scores, direction=side)).exp().sum()
        wanted[b] -= total.detach().log() / len(sides)
    torch.testing.assert_close(found.detach(), wanted)
    found.sum().backward()
    assert memm.transitions.grad is not None
    assert memm.transitions.grad.isfinite().all()
    known = tags.clamp(min=0)
    torch.testing.assert_close(memm.nll(f, known, mask, ignored="unknown"), memm.nll(f, known, mask))
    absent = memm.nll(f, tags, mask, "none", ignored="absent")
    torch.testing.assert_close(absent, memm.nll(f, known, mask & (tags >= 0), "none"))
    with pytest.raises(ValueError, match=r"tags must lie in \[0, 4\) at live steps, got -100"):
        memm.nll(f, tags, mask.fill_(True))


def test_constraints() -> None:
    """Forbidden pairs, starts and ends leave the local softmax; holes in the mask are skipped."""
    constraints = tag_constraints(["B-X", "I-X", "O", "B-Y"], "BIO")
    memm = made(constraints=constraints)
    assert set(memm.state_dict()) == {"transitions"}
    f, _, mask = batch()
    for path in memm.decode(f, mask):
        for before, after in zip([2, *path], path, strict=False):
            assert after != 1 or before in (0, 1)
    illegal = torch.tensor([[1, 0, 2]])
    assert memm.nll(f[:1, :3], illegal) == torch.inf
    legal = torch.tensor([[0, 1, 2]])
    allowed = [[y for y in range(K) if not (y == 1 and k == 0)] for k in range(3)]
    total = sum(
        (-made(constraints=constraints, direction="forward").nll(f[:1, :3], torch.tensor([path]))).exp()
        for path in itertools.product(*allowed)
    )
    torch.testing.assert_close(total, torch.tensor(1.0))
    assert memm.nll(f[:1, :3], legal).isfinite()
    with pytest.raises(ValueError, match="constraints forbid pairs of tags, which rank never forms"):
        MEMM(K, rank=2, constraints=constraints)
    end = None, None, torch.tensor([True, False, True, True])
    assert all(path[-1] != 1 for path in made(constraints=end).decode(f, mask) if path)


def test_swapping_the_class_name_is_the_whole_change() -> None:
    """Every call of a CRF works, in both layouts, compiled, copied, pickled; parameter groups know it."""
    f, tags, mask = batch()
    for cls in (CRF, MEMM):
        model = nn.ModuleDict({"encoder": nn.Linear(K, K), "head": cls(K, batch_first=True)})
        head = model["head"]
        assert isinstance(head, (CRF, MEMM))
        groups = crf_parameter_groups(model, 0.1, 10.0)
        assert [group["lr"] for group in groups] == [0.1, 1.0]
        loss = head.nll(model["encoder"](f), tags, mask, "token_mean")
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            assert other.decode(f, mask) == head.decode(f, mask)
        torch.compiler.reset()
        compiled = torch.compile(lambda f: head.nll(f, tags, mask), fullgraph=True, backend="aot_eager")  # noqa: B023
        torch.testing.assert_close(compiled(f), head.nll(f, tags, mask))
    assert str(MEMM(3, rank=2)) == "MEMM(num_tags=3, direction='both', rank=2, variant='sum')"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    f, tags, mask = batch()
    for memm in (made(), made(rank=2)):
        right = memm.double().nll(f.double(), tags, mask)
        found = memm.to(dtype).nll(f.to(dtype), tags, mask)
        torch.testing.assert_close(found.double(), right, rtol=0.02 if dtype == torch.bfloat16 else 1e-9, atol=0.0)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_tags": 0}, ValueError, "invalid number of tags: 0"),
    ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    ({"rank": "2"}, TypeError, "^rank must be an integer, got '2'"),
    ({"direction": "up"}, ValueError, "direction must be 'both', 'forward' or 'backward', got 'up'"),
    ({"variant": "half"}, ValueError, "variant must be 'sum' or 'mean', got 'half'"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments(case: int) -> None:
    changed, error, message = BAD[case]
    with pytest.raises(error, match=message):
        MEMM(**({"num_tags": 3} | changed))


def test_bad_calls() -> None:
    memm, (f, tags, mask) = made(), batch()
    with pytest.raises(ValueError, match="expected last dimension of emissions is 4, got 3"):
        memm(f[..., :3], tags)
    with pytest.raises(ValueError, match="must match"):
        memm(f, tags[:2])
    with pytest.raises(ValueError, match="invalid reduction: average"):
        memm(f, tags, mask, "average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compute must be"):
        memm(f, tags, mask, compute="score")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ignored must be None, 'absent' or 'unknown', got 'gone'"):
        memm(f, tags, mask, ignored="gone")  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
def test_ends_are_those_of_live_steps(direction: Any) -> None:
    """What constraints forbid first and last is -inf in the emissions there, of each sequence's own live steps."""
    torch.manual_seed(2)
    start, end = torch.tensor([True, False, True, True]), torch.tensor([True, True, False, True])
    f, tags, mask = batch()
    f[..., 1:3] += 5.0  # what is forbidden would be likely
    tags = torch.where(tags % 3 == 0, tags, 3)
    count = mask.cumsum(1)
    first, last = mask & (count == 1), mask & (count == count[:, -1:])
    forbidden = (first.unsqueeze(2) & ~start) | (last.unsqueeze(2) & ~end)
    for given, away in (((start, None, end), forbidden), ((None, None, end), last.unsqueeze(2) & ~end)):
        layer = made(direction=direction, constraints=given)
        plain = made(direction=direction)
        right = plain.nll(f.masked_fill(away, -torch.inf), tags, mask, "none")
        assert right.isfinite().all()
        torch.testing.assert_close(layer.nll(f, tags, mask, "none"), right, rtol=0, atol=0)
        path = layer.viterbi(f, mask)[1]
        assert not away.gather(2, path.clamp(min=0).unsqueeze(2)).any()


def test_losses_of_every_path_are_no_less_than_zero() -> None:
    f, ignored = torch.randn(50, 6, K), torch.full((50, 6), -100)
    losses = made().nll(f, ignored, reduction="none", ignored="unknown")
    assert (losses >= 0).all()
    torch.testing.assert_close(losses, torch.zeros(50), rtol=0, atol=1e-5)
