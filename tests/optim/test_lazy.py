"""Lazy, Lookahead over lazy optimizers, clipping of sparse gradients and reports of rows."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, SparseAdam
from torch.optim.lr_scheduler import StepLR
from torch.utils.checkpoint import checkpoint

from pyseq.ops import _lookahead
from pyseq.optim import Lazy, LazyAdam, Lookahead, clip_grad_norm_, row_report

ROOM = "lazy_adam"
MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "Adam": lambda p: Adam(p, 0.05),
    "AdamW": lambda p: AdamW(p, 0.05, weight_decay=0.3, amsgrad=True),
    "SGD": lambda p: SGD(p, 0.05, momentum=0.9),
    "fused": lambda p: Adam(p, 0.05, fused=True),
}


class Net(nn.Module):
    def __init__(self, sparse: bool = False, rows: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(rows, 5, sparse=sparse, padding_idx=0)
        self.bag = nn.EmbeddingBag(rows, 5, sparse=sparse)
        self.head = nn.Linear(5, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.table(rows) + self.bag(rows.view(-1, 1))).sin().sum()  # type: ignore[no-any-return]

    @property
    def tables(self) -> list[nn.Module]:
        return [self.table, self.bag]


def train(net: nn.Module, opt: Optimizer, batches: list[Tensor]) -> None:
    for rows in batches:
        opt.zero_grad()
        net(rows).backward()
        opt.step()


def batches(count: int, rows: int = 12, seed: int = 1, size: int = 4) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(rows, (size,), generator=random) for _ in range(count)]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


@pytest.mark.parametrize("mode", ["index", "zero"])
@pytest.mark.parametrize("name", MAKE)
def test_the_inner_step_with_other_rows_left_alone(name: str, mode: Any) -> None:
    """The definition, by a mask over the inner optimizer's step, which is made once a step."""
    net, right = Net(), Net()
    for each in (net, right):
        nn.init.ones_(each.table.weight)  # also of the padding row, which decay would move
    opt, inner = Lazy(MAKE[name](net.parameters()), net.tables, mode), MAKE[name](right.parameters())
    for rows in batches(6):
        before = copy.deepcopy(right)
        train(net, opt, [rows])
        train(right, inner, [rows])
        for table, old, pad in ((right.table, before.table, 0), (right.bag, before.bag, None)):
            seen = torch.zeros(12, 1, dtype=torch.bool)
            seen[rows] = True
            if pad is not None:
                seen[pad] = False
            with torch.no_grad():
                table.weight.copy_(torch.where(seen, table.weight, old.weight))  # type: ignore[operator]
        assert equal(net, right)
    if name != "SGD":
        assert opt.state[net.table.weight]["step"] == 6


def test_decay_is_lazy_adam() -> None:
    net, other = Net(), Net(sparse=True)
    opts = Lazy(Adam(net.parameters(), 0.05), net.tables), LazyAdam(other.parameters(), 0.05, semantics="decay")
    for model, opt in zip((net, other), opts, strict=True):
        train(model, opt, batches(7))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def moved(net: Net, opt: Optimizer, before: Tensor) -> list[int]:
    opt.step()
    return (net.table.weight != before).any(1).nonzero().view(-1).tolist()  # type: ignore[no-any-return]


def momentum(mode: Any = "index", **options: Any) -> tuple[Net, Lazy, Tensor]:
    """Every row has one, so rows move wherever they may."""
    net = Net()
    opt = Lazy(SGD(net.parameters(), 0.1, momentum=0.9, **options), net.tables, mode)
    train(net, opt, [torch.arange(12)])
    opt.zero_grad()
    return net, opt, net.table.weight.detach().clone()


def test_which_forward_passes_count() -> None:
    """With gradients on, and reached by a backward pass since the last step or zero_grad; recomputed ones, too."""
    net, opt, before = momentum()
    with torch.no_grad():
        net(torch.tensor([1]))
    loss = net(torch.tensor([2, 3]))
    opt.zero_grad()  # between forward and backward
    loss.backward()
    net(torch.tensor([4])).backward()  # accumulated
    net(torch.tensor([5]))  # whose backward pass is still to come, or never
    assert moved(net, opt, before) == [2, 3, 4]
    net, opt, before = momentum()
    net(torch.tensor([6])).backward()
    opt.zero_grad()  # a step that was skipped, as by GradScaler
    net.table(input=torch.tensor([[7], [0]])).sum().backward()
    assert moved(net, opt, before) == [7]
    net, opt, before = momentum()
    for reentrant in (True, False):
        inputs = net.table(torch.tensor([8]))
        checkpoint(
            lambda x: net.head(x + net.table(torch.tensor([9]))).sum(), inputs, use_reentrant=reentrant
        ).backward()
    assert moved(net, opt, before) == [8, 9]


@pytest.mark.parametrize("mode", ["index", "zero"])
def test_ties_and_penalties_are_for_index_mode(mode: Any) -> None:
    """An output layer that is the table, and a penalty on it, give every row a gradient."""
    net, opt, before = momentum(mode)
    logits = net.table(torch.tensor([3])) @ net.table.weight.T
    (logits.sum() + net.table.weight.square().sum()).backward()
    assert moved(net, opt, before) == ([3] if mode == "index" else [*range(12)])


def test_a_row_without_gradient_counts_by_index_alone() -> None:
    for mode, rows in (("index", [3, 4]), ("zero", [3])):
        net, opt, before = momentum(mode)
        (net.table(torch.tensor([3, 4])) * torch.tensor([[1.0], [0.0]])).sum().backward()
        assert moved(net, opt, before) == rows


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of Adagrad
def test_sparse_gradients() -> None:
    """For inner optimizers that take them; Adagrad does."""
    for mode in ("index", "zero"):
        one, two = Net(sparse=True), Net(sparse=True)
        opt = Lazy(Adagrad(one.parameters(), 0.1), one.tables, mode)  # type: ignore[arg-type]
        train(one, opt, batches(4))
        train(two, Adagrad(two.parameters(), 0.1), batches(4))
        assert equal(one, two)


def test_compiled_forward() -> None:
    torch.compiler.reset()
    net, opt, before = momentum()
    torch.compile(net, fullgraph=True, backend="aot_eager")(torch.tensor([2, 3])).backward()
    assert moved(net, opt, before) == [2, 3]
    torch.compiler.reset()


def test_lazy_resumes_and_copies_exactly() -> None:
    net = Net()
    opt = Lazy(Adam(net.parameters(), 0.05), net.tables, count_rows=True)
    train(net, opt, batches(4))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others: list[Any] = [copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))]
    for kind in ("plain", "dcp"):
        fresh = copy.deepcopy(net)
        again = Lazy(Adam(fresh.parameters(), 0.05), fresh.tables, count_rows=True)
        if kind == "plain":
            again.load_state_dict(torch.load(file, weights_only=True))
        else:
            get_optimizer_state_dict(fresh, again)
            set_optimizer_state_dict(fresh, again, copy.deepcopy(get_optimizer_state_dict(net, opt)))
        others.append((fresh, again))
    train(net, opt, batches(4, seed=2))
    for other, again in others:
        train(other, again, batches(4, seed=2))
        assert equal(other, net)
        found, wanted = row_report(again), row_report(opt)
        assert all(torch.equal(a.counts, b.counts) for a, b in zip(found.tables, wanted.tables, strict=True))
    alone = copy.deepcopy(net)  # brings no optimizer along
    assert not any(
        isinstance(x, Optimizer) for hook in alone.table._forward_hooks.values() for x in vars(hook).values()
    )
    with pytest.raises(TypeError, match="state_dict must be a dict with state and param_groups"):
        opt.load_state_dict({"state": {}})
    with pytest.raises(ValueError, match=r"doesn't match the size of optimizer's group|different number"):
        opt.load_state_dict(Adam(nn.Linear(2, 2).parameters()).state_dict())


def test_schedulers_hooks_closures_and_groups_reach_the_inner_optimizer() -> None:
    net = Net()
    opt = Lazy(SGD(net.table.parameters(), 0.1), [net.table])
    opt.add_param_group({"params": net.head.parameters()})
    schedule, called = StepLR(opt, 1, 0.5), list[str]()
    opt.register_step_pre_hook(lambda *_: called.append("before"))
    opt.register_step_post_hook(lambda *_: called.append("after"))

    def closure() -> Any:
        opt.zero_grad()
        loss = net(torch.tensor([1, 2]))
        loss.backward()
        return loss

    before = net.table.weight.detach().clone()
    assert isinstance(opt.step(closure), Tensor)
    schedule.step()
    assert [group["lr"] for group in opt.optimizer.param_groups] == [0.05, 0.05]
    assert called == ["before", "after"]
    assert (net.table.weight != before).any(1).tolist() == [i in (1, 2) for i in range(12)]


def test_a_second_optimizer_of_the_same_modules() -> None:
    """Takes the place of the first one's hooks."""
    net, _, before = momentum()
    opt = Lazy(SGD(net.parameters(), 0.1), net.tables)
    assert len(net.table._forward_hooks) == 1
    net(torch.tensor([4])).backward()
    assert moved(net, opt, before) == [4]


def test_wrong_arguments() -> None:
    net = Net()
    opt = Adam(net.parameters())
    with pytest.raises(TypeError, match="wrapped by nothing yet, got Lookahead"):
        Lazy(Lookahead(opt), net.tables)
    with pytest.raises(ValueError, match="mode must be 'index' or 'zero', got 'rows'"):
        Lazy(opt, net.tables, "rows")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"modules must be of nn.Embedding or nn.EmbeddingBag, got Linear"):
        Lazy(opt, [net.head])
    with pytest.raises(ValueError, match=r"the optimizer does not have the weight of modules\[0\], Embedding\(2, 2\)"):
        Lazy(opt, [nn.Embedding(2, 2)])


OVER: dict[str, Callable[[Net], Optimizer]] = {
    "Lazy": lambda net: Lazy(Adam(net.parameters(), 0.05), net.tables),
    "LazyAdam": lambda net: LazyAdam(net.parameters(), 0.05),
    "LazyAdam decay": lambda net: LazyAdam(net.parameters(), 0.05, semantics="decay", weight_decay=0.1),
    "LazyAdam rows": lambda net: LazyAdam(
        [{"params": [net.table.weight, net.bag.weight], "lazy": True}, {"params": net.head.parameters()}], 0.05
    ),
    "SparseAdam": lambda net: SparseAdam([net.table.weight, net.bag.weight], 0.05),
    "SGD": lambda net: SGD(net.parameters(), 0.05, momentum=0.9),
}


@pytest.mark.parametrize("name", OVER)
def test_lookahead_over_lazy_ones_moves_few_rows_with_the_same_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with weights written from outside in between; and what it passes over is counted."""
    sparse = name in ("LazyAdam", "LazyAdam decay", "SparseAdam")
    passed: dict[tuple[bool, int], int] = {}
    now = (False, 0)
    update = _lookahead.update

    def counted(pairs: Any, *rest: Any) -> Any:
        passed[now] = max(passed.get(now, 0), *(len(x) for x in pairs.fast))
        return update(pairs, *rest)

    monkeypatch.setattr(_lookahead, "update", counted)
    few, full = Net(sparse, 200), Net(sparse, 200)
    opts = [Lookahead(OVER[name](net), k=2) for net in (few, full)]
    for i, rows in enumerate(batches(12, 200)):
        opts[1]._moved = type(opts[1]._moved)()  # knows of no step, so passes over all
        for net, opt in zip((few, full), opts, strict=True):
            if i == 7:
                with torch.no_grad():
                    net.table.weight[::3] *= 1.5
            now = (net is few, i)
            train(net, opt, [rows])
        assert equal(few, full)
        for p, q in zip(*(opt.param_groups[0]["params"] for opt in opts), strict=True):
            assert torch.equal(opts[0]._kept[p]["lookahead_slow"], opts[1]._kept[q]["lookahead_slow"])
    own, all_rows = ([n for (of_few, _), n in passed.items() if of_few is x] for x in (True, False))
    assert all_rows == [200] * 6
    if name == "SGD":  # momentum moves rows that nobody named
        assert own == [200] * 6
    else:
        assert own[0] == 200  # nothing is known yet
        assert own[3] == 200  # somebody wrote to the table
        assert all(n <= 8 for n in own[1:3] + own[4:])


@pytest.mark.parametrize("momentum", ["keep", "reset", "pullback"])
@pytest.mark.parametrize("name", OVER)
def test_lookahead_over_lazy_ones_resumes(name: str, momentum: Any) -> None:
    sparse = name in ("LazyAdam", "LazyAdam decay", "SparseAdam")
    net = Net(sparse)
    opt = Lookahead(OVER[name](net), k=3, momentum=momentum)
    train(net, opt, batches(4))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(net)
    again = Lookahead(OVER[name](fresh), k=3, momentum=momentum)
    again.load_state_dict(torch.load(file, weights_only=True))
    both: list[tuple[Any, Any]] = [(fresh, again), copy.deepcopy((net, opt))]
    train(net, opt, batches(5, seed=2))
    for other, copied in both:
        train(other, copied, batches(5, seed=2))
        assert equal(other, net)


def sparse_grad(p: nn.Parameter, rows: list[int], values: Tensor) -> None:
    p.grad = torch.sparse_coo_tensor(torch.tensor([rows]), values, p.shape, check_invariants=True)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clip_adds_up_duplicates_first(norm_type: float) -> None:
    """As for the same gradients made dense."""
    torch.manual_seed(0)
    for largest in (0.5, 1e6):
        tables = [nn.Parameter(torch.zeros(6, 3)), nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(5))]
        sparse_grad(tables[0], [5, 1, 5, 0, 5], torch.randn(5, 3))
        sparse_grad(tables[1], [], torch.zeros(0, 2))
        tables[2].grad = torch.randn(5)
        dense = [nn.Parameter(p.detach().clone()) for p in tables]
        for p, q in zip(tables, dense, strict=True):
            assert p.grad is not None
            q.grad = p.grad.to_dense() if p.grad.is_sparse else p.grad.clone()
        found = clip_grad_norm_(iter([*tables, nn.Parameter(torch.zeros(1))]), largest, norm_type)
        torch.testing.assert_close(found, nn.utils.clip_grad_norm_(dense, largest, norm_type))
        for p, q in zip(tables, dense, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad.to_dense() if p.grad.is_sparse else p.grad, q.grad)
        assert tables[0].grad is not None
        assert not tables[0].grad.is_coalesced()


def test_clip_of_halves_coalesced_and_bad_ones() -> None:
    p = nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    sparse_grad(p, [1, 1, 1], torch.full((3, 2), 1.0, dtype=torch.bfloat16))
    assert float(clip_grad_norm_(p, 1e9)) == pytest.approx(3 * 2**0.5)
    q = nn.Parameter(torch.zeros(2, 2))
    q.grad = torch.ones(2, 2).to_sparse()  # by element, coalesced
    assert float(clip_grad_norm_([q], 1.0)) == 2
    torch.testing.assert_close(q.grad.to_dense(), torch.full((2, 2), 0.5), rtol=1e-5, atol=0)
    assert float(clip_grad_norm_([], 1.0)) == 0
    with pytest.raises(ValueError, match="max_norm must be a number from 0, got nan"):
        clip_grad_norm_(q, float("nan"))
    sparse_grad(p, [1], torch.full((1, 2), torch.inf, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(p, 1.0, error_if_nonfinite=True)


def test_report_of_rows(tmp_path: Path) -> None:
    """Counts of LazyAdam and of Lazy, in Lookahead or not; dense gradients update every row in every step."""
    rows = batches(5)
    wanted = torch.stack([torch.bincount(x, minlength=12) > 0 for x in rows]).sum(0)
    net = Net(sparse=True)
    opt = LazyAdam(net.named_parameters(), count_rows=True)
    train(net, Lookahead(opt, k=2), rows)
    report = row_report(opt)
    assert [(x.name, x.lazy, x.steps) for x in report.tables] == [
        ("table.weight", True, 5), ("bag.weight", True, 5), ("head.weight", False, 5),
    ]  # fmt: skip
    assert torch.equal(report.tables[1].counts, wanted)
    assert torch.equal(report.tables[2].counts, torch.full((3,), 5))
    assert "bag.weight" in str(report)
    assert max(map(len, str(report).splitlines())) <= 100
    pytest.importorskip("matplotlib", reason="reports draw: pip install matplotlib")
    report.plot(tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 5000
    for inner in (Adam, SGD):
        net = Net()
        lazy = Lazy(inner(net.parameters(), 0.1), net.tables, count_rows=True)
        train(net, Lookahead(lazy, k=2), rows)
        assert torch.equal(row_report(Lookahead(lazy)).tables[1].counts, wanted)
    dense = Net()
    plain = Adam(dense.parameters())
    train(dense, plain, rows)
    assert not any(x.lazy for x in row_report(plain).tables)
    for uncounted in (LazyAdam(dense.parameters()), Lazy(plain, dense.tables)):
        with pytest.raises(ValueError, match=r"no matrix was updated yet|with count_rows=True"):
            row_report(uncounted)
        train(dense, uncounted, rows[:1])
        with pytest.raises(ValueError, match=f"make the {type(uncounted).__name__} with count_rows=True"):
            row_report(uncounted)


def test_two_processes(on_two: Callable[[str], None]) -> None:
    """DDP with sparse gradients, LazyAdam and Lazy, follows one process."""
    on_two("lazy_on_two.py")


def test_hooks_that_do_not_run_are_told() -> None:
    """A gradient without a look-up, as of a model compiled before, or by autograd.grad; and tables that are frozen."""
    net = Net()
    opt = Lazy(Adam(net.parameters()), net.tables)
    net.table.weight.grad = torch.autograd.grad(net(torch.tensor([1, 4])), net.table.weight)[0]
    with pytest.warns(UserWarning, match="none of its rows was looked up"):
        opt.step()
    nothing: list[nn.Module] = []
    for none in (nothing, iter(nothing)):
        with pytest.raises(ValueError, match="modules must name an embedding at least"):
            Lazy(opt.optimizer, none)
    frozen = nn.Embedding.from_pretrained(torch.ones(3, 2))
    opt = Lazy(SGD([frozen.weight], 0.1), [frozen])
    assert not frozen.weight.requires_grad
    frozen.requires_grad_(True)
    frozen(torch.tensor([1])).sum().backward()
    opt.step()
    assert (frozen.weight != 1).any(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="this is the state of another optimizer than SGD: it has"):
        opt.load_state_dict(Adam([frozen.weight]).state_dict())


def test_lookahead_restores_beside_frozen_parameters() -> None:
    """Of which a distributed checkpoint has no state."""
    nets = [Net(sparse=True) for _ in range(2)]
    for net in nets:
        net.head.requires_grad_(False)
    opts = [Lookahead(LazyAdam(net.parameters()), k=2) for net in nets]
    train(nets[0], opts[0], batches(3))
    nets[1].load_state_dict(nets[0].state_dict())
    set_optimizer_state_dict(nets[1], opts[1], copy.deepcopy(get_optimizer_state_dict(nets[0], opts[0])))
    for net, opt in zip(nets, opts, strict=True):
        train(net, opt, batches(4, seed=3))
    assert equal(*nets)
