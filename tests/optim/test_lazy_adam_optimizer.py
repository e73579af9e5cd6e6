"""LazyAdam as an optimizer: what torch asks of one, and what rows that are not seen must not notice."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from pyseq.optim import LazyAdam, clip_grad_norm_, row_report

WAYS: list[dict[str, Any]] = [
    {}, {"semantics": "decay"}, {"bias_correction": "row"}, {"semantics": "decay", "bias_correction": "row"},
    {"amsgrad": True, "weight_decay": 0.1}, {"maximize": True},
]  # fmt: skip


class Net(nn.Module):
    def __init__(self, sparse: bool = True, rows: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(rows, 5, sparse=sparse, padding_idx=0)
        self.head = nn.Linear(5, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.table(rows)).sin().sum()  # type: ignore[no-any-return]


def train(net: Net, opt: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for rows in batches:
        opt.zero_grad()
        net(rows).backward()
        opt.step()


def batches(count: int, rows: int = 12, seed: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(rows, (8,), generator=random) for _ in range(count)]


def equal(a: Net, b: Net) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_all_rows_in_every_step_are_adamw(way: dict[str, Any]) -> None:
    """Sparse, and dense by rows of zeros."""
    lazy, rows, dense = Net(), Net(sparse=False), Net(sparse=False)
    options = {k: v for k, v in way.items() if k not in ("semantics", "bias_correction")}
    opts = [
        LazyAdam(lazy.parameters(), lr=0.05, **way),
        LazyAdam(
            [{"params": rows.table.parameters(), "lazy": True}, {"params": rows.head.parameters()}], lr=0.05, **way
        ),
        torch.optim.AdamW(dense.parameters(), lr=0.05, **({"weight_decay": 0.0} | options)),
    ]
    every = [torch.randperm(12).repeat(2)[:23] for _ in range(6)]
    every = [torch.cat([x, torch.arange(12)]) for x in every]
    for net, opt in zip((lazy, rows, dense), opts, strict=True):
        train(net, opt, every)
    for net in (lazy, rows):
        for p, q in zip(net.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(p[1:] if p.shape == (12, 5) else p, q[1:] if q.shape == (12, 5) else q)
        assert torch.equal(net.table.weight[0], torch.zeros(5))


def test_decay_is_dense_adam_with_a_mask() -> None:
    """The definition: averages of every row fade in every step, and weights move where the row was seen."""
    net, right = Net(), Net(sparse=False)
    opt = LazyAdam(net.parameters(), lr=0.05, semantics="decay")
    dense = torch.optim.Adam(right.parameters(), lr=0.05)
    for rows in batches(9):
        train(net, opt, [rows])
        before = right.table.weight.detach().clone()
        train(right, dense, [rows])
        seen = torch.zeros(12, 1, dtype=torch.bool)
        seen[rows] = True
        with torch.no_grad():
            right.table.weight.copy_(torch.where(seen, right.table.weight, before))
    for p, q in zip(net.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_skip_keeps_every_bit_of_other_rows() -> None:
    net = Net()
    opt = LazyAdam(net.parameters(), weight_decay=0.1)
    train(net, opt, batches(3))
    state = opt.state[net.table.weight]
    before = [x.clone() for x in (net.table.weight, state["exp_avg"], state["exp_avg_sq"])]
    train(net, opt, [torch.tensor([3, 4, 3])])
    others = [i for i in range(12) if i not in (3, 4)]
    for x, old in zip((net.table.weight, state["exp_avg"], state["exp_avg_sq"]), before, strict=True):
        assert torch.equal(x[others], old[others])
        assert not torch.equal(x[3], old[3])


def test_the_first_step_of_a_row_that_comes_late() -> None:
    """At most lr with the row's own correction; more with that of the table."""
    moved = {}
    for bias in ("global", "row"):
        table = nn.Parameter(torch.zeros(2, 1))
        opt = LazyAdam([table], lr=1.0, bias_correction=bias)  # type: ignore[arg-type]
        for step in range(3000):
            table.grad = sparse([int(step == 2999)], torch.ones(1, 1), (2, 1))
            opt.step()
        moved[bias] = -float(table.detach()[1])
    assert moved["row"] == pytest.approx(1.0, rel=1e-5)
    assert moved["global"] == pytest.approx(0.1 / (0.001 / (1 - 0.999**3000)) ** 0.5, rel=1e-3)


def sparse(rows: list[int], values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=True)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_tables_move_by_small_steps(state_dtype: torch.dtype) -> None:
    """Where rounding to nearest stands still: 300 steps of 1e-4, on weights of 1; torch's generator is not used."""
    table = nn.Parameter(torch.ones(2000, 4, dtype=torch.bfloat16))
    opt = LazyAdam([table], lr=1e-4, state_dtype=state_dtype)
    generator = torch.get_rng_state()
    rows = list(range(2000))
    for _ in range(300):
        table.grad = sparse(rows, torch.ones(2000, 4, dtype=torch.bfloat16), (2000, 4))
        opt.step()
    assert float(1 - table.detach().double().mean()) == pytest.approx(0.03, rel=0.05)
    assert torch.equal(generator, torch.get_rng_state())
    assert opt.state[table]["exp_avg"].dtype == state_dtype


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_resume(way: dict[str, Any], dtype: torch.dtype) -> None:
    """By a plain checkpoint, a copy, a pickle and torch.distributed.checkpoint into a fresh optimizer."""
    net = Net().to(dtype)
    opt = LazyAdam(net.parameters(), lr=0.05, count_rows=True, **way)
    train(net, opt, batches(4))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = []
    for kind in ("plain", "copy", "pickle", "dcp"):
        if kind in ("copy", "pickle"):
            pair = copy.deepcopy((net, opt)) if kind == "copy" else pickle.loads(pickle.dumps((net, opt)))
            others.append(pair)
            continue
        fresh = copy.deepcopy(net)
        again = LazyAdam(fresh.parameters(), lr=0.05, count_rows=True, **way)
        if kind == "plain":
            again.load_state_dict(saved)
        else:
            before: Any = copy.deepcopy(get_optimizer_state_dict(fresh, again))
            set_optimizer_state_dict(fresh, again, copy.deepcopy(get_optimizer_state_dict(net, opt)))
            assert before["state"]["table.weight"]["step"] == 0
        others.append((fresh, again))
    dtypes = {name: x.dtype for name, x in opt.state[net.table.weight].items()}
    train(net, opt, batches(4, seed=2))
    for other, again in others:
        assert {name: x.dtype for name, x in again.state[other.table.weight].items()} == dtypes
        train(other, again, batches(4, seed=2))
        assert equal(other, net)
        for p, q in zip(other.parameters(), net.parameters(), strict=True):
            assert all(torch.equal(again.state[p][k], opt.state[q][k]) for k in opt.state[q])


def test_schedulers_hooks_closures_and_groups() -> None:
    net = Net()
    opt = LazyAdam(
        [{"params": net.table.parameters(), "lr": torch.tensor(0.0)}, {"params": net.head.parameters()}], lr=0.1
    )
    schedule = LambdaLR(opt, lambda step: float(step))
    called: list[str] = []
    opt.register_step_pre_hook(lambda *_: called.append("before"))
    opt.register_step_post_hook(lambda *_: called.append("after"))
    before = net.table.weight.detach().clone()

    def closure() -> Any:
        opt.zero_grad()
        loss = net(torch.tensor([1, 2]))
        loss.backward()
        return loss

    assert isinstance(opt.step(closure), Tensor)  # the rate is 0
    assert torch.equal(net.table.weight, before)
    schedule.step()
    opt.step(closure)
    assert called == ["before", "after"] * 2
    extra = nn.Embedding(3, 5, sparse=True)
    opt.add_param_group({"params": extra.parameters(), "lr": 0.1})
    extra(torch.tensor([1])).sum().backward()
    opt.step()
    assert set(opt.state[extra.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert opt.state[net.table.weight]["step"] == 3


def test_gradients_that_come_in_parts_and_ones_that_do_not() -> None:
    """Accumulated ones are added up; rows without one, and parameters without one, stay."""
    one, two = Net(), Net()
    opts = [LazyAdam(net.parameters(), lr=0.1) for net in (one, two)]
    first, second = batches(2)
    one(torch.cat([first, second])).backward()
    two(first).backward()
    two(second).backward()
    for opt in opts:
        opt.step()
        opt.zero_grad()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    before = copy.deepcopy(one)
    opts[0].step()
    one.table(torch.zeros(0, dtype=torch.int64)).sum().backward()
    opts[0].step()
    assert equal(one, before)


def test_a_gradient_that_is_no_number_leaves_its_row() -> None:
    table = nn.Parameter(torch.ones(3, 2))
    opt = LazyAdam([table])
    table.grad = sparse([0, 2], torch.tensor([[1.0, torch.nan], [1.0, 1.0]]), (3, 2))
    opt.step()
    assert torch.equal(table[:2], torch.ones(2, 2))
    assert (table[2] < 1).all()


def test_onecycle_and_decay() -> None:
    net = Net()
    opt = LazyAdam(net.parameters(), semantics="decay")
    schedule = OneCycleLR(opt, 0.1, total_steps=9)
    train(net, opt, batches(1))
    schedule.step()
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match=r"betas may not change with semantics='decay', got .* cycle_momentum=False"):
        train(net, opt, batches(1))
    assert equal(net, before)
    net = Net()
    opt = LazyAdam(net.parameters())
    schedule = OneCycleLR(opt, 0.1, total_steps=9)
    for rows in batches(5):
        train(net, opt, [rows])
        schedule.step()


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "lr must be a finite number from 0, got -1.0"),
    (
        {"lr": torch.ones(2)},
        ValueError,
        r"lr must be a number or a real tensor of one, got torch.float32 of shape \(2,\)",
    ),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be a finite number from 0, got -1.0"),
    ({"lr": "1e-3"}, TypeError, "lr must be a number, got '1e-3'"),
    ({"betas": 0.9}, ValueError, r"betas must be two numbers in \[0, 1\), got 0.9"),
    ({"amsgrad": "yes"}, TypeError, "amsgrad must be True or False, got 'yes'"),
    ({"eps": float("nan")}, ValueError, "eps must be a finite number from 0, got nan"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ({"semantics": "replay"}, ValueError, "semantics must be 'skip' or 'decay', got 'replay'"),
    ({"bias_correction": "rows"}, ValueError, "bias_correction must be 'global' or 'row', got 'rows'"),
    ({"state_dtype": torch.float16}, ValueError, "state_dtype must be torch.float32 or torch.bfloat16"),
    ({"capturable": True}, ValueError, "lr must be a tensor with capturable=True"),
    ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, TypeError, "must be real and floating"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments(case: int) -> None:
    changed, error, message = BAD[case]
    with pytest.raises(error, match=message):
        LazyAdam(**{"params": [nn.Parameter(torch.ones(2, 2))]} | changed)


def test_bad_gradients_and_states() -> None:
    good, vector = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    opt = LazyAdam([good, vector])
    good.grad, vector.grad = sparse([1], torch.ones(1, 2), (3, 2)), torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match=r"rows of a matrix can be lazy, got a parameter of shape \(3,\)"):
        opt.step()
    assert torch.equal(good, torch.ones(3, 2))
    with pytest.raises(ValueError, match="a gradient is sparse in a group with lazy=False"):
        LazyAdam([{"params": [good], "lazy": False}]).step()
    half = nn.Parameter(torch.ones(3, 2).half())
    half.grad = sparse([1], torch.ones(1, 2).half(), (3, 2))
    with pytest.raises(TypeError, match="tables must be of dtype"):
        LazyAdam([half]).step()
    other = torch.optim.Adam([nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="this is the state of another optimizer than LazyAdam"):
        opt.load_state_dict(other.state_dict())
    wide = LazyAdam([nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(3, 4\), wanted \(3, 2\)"):
        opt.load_state_dict(wide.state_dict())


def test_a_bad_row_anywhere_leaves_everything_as_it_was() -> None:
    """Also tables that come before it, and their counts of steps."""
    for alone in (True, False):
        tables = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4, 2))]
        opt = LazyAdam([{"params": [p]} for p in tables])
        for p, row in zip(tables, (1, 2), strict=True):
            p.grad = sparse([row], torch.ones(1, 2), (p.size(0), 2))
        opt.step()
        before = copy.deepcopy((tables, [opt.state[p] for p in tables]))
        wrong = torch.sparse_coo_tensor(torch.tensor([[4]]), torch.ones(1, 2), (4, 2), check_invariants=False)
        tables[1].grad = wrong
        if alone:
            tables[0].grad = None
        with pytest.raises(ValueError, match="has rows 0 to 3, and a gradient for row 4"):
            opt.step()
        for p, state, old, was in zip(tables, [opt.state[p] for p in tables], *before, strict=True):
            assert torch.equal(p, old)
            assert all(torch.equal(x, was[name]) for name, x in state.items())


def test_scaler() -> None:
    """Scaled gradients are unscaled, clipped and stepped; a step that is skipped does not count."""
    net, right = Net(), Net()
    opts = [LazyAdam(n.parameters(), lr=0.05) for n in (net, right)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, rows in enumerate(batches(5)):
        for opt in opts:
            opt.zero_grad()
        scaler.scale(net(rows) * (torch.inf if i == 2 else 1)).backward()
        scaler.unscale_(opts[0])
        clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(opts[0])
        scaler.update()
        if i != 2:
            right(rows).backward()
            clip_grad_norm_(right.parameters(), 0.1)
            opts[1].step()
        for p, q in zip(net.parameters(), right.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert opts[0].state[net.table.weight]["step"] == 4


def test_compiled_step() -> None:
    net, plain = Net(), Net()
    opt, other = (LazyAdam(n.parameters(), lr=torch.tensor(0.05)) for n in (net, plain))
    torch.compiler.reset()
    compiled = torch.compile(lambda: opt.step(), backend="aot_eager")
    for rows in batches(4):
        for n in (net, plain):
            n.zero_grad()
            n(rows).backward()
        compiled(), other.step()
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    torch.compiler.reset()


@pytest.mark.gpu
def test_a_captured_step() -> None:
    """In a CUDA graph, and without a wait for the device outside of one."""
    captured, plain = Net().cuda(), Net().cuda()
    opts = [LazyAdam(n.parameters(), torch.tensor(0.05, device="cuda"), capturable=True) for n in (captured, plain)]
    rows = [x.cuda() for x in batches(8)]
    given = rows[0].clone()

    def step() -> None:
        opts[0].zero_grad(set_to_none=True)
        captured(given).backward()
        opts[0].step()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for x in rows[:3]:
            given.copy_(x)
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    given.copy_(rows[3])
    with torch.cuda.graph(graph):
        step()
    for x in rows[3:]:
        given.copy_(x)
        graph.replay()
    for i, x in enumerate(rows):
        plain.zero_grad()
        plain(x).backward()
        torch.cuda.set_sync_debug_mode("error" if i > 1 else "default")
        opts[1].step()
        torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(captured.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_dense_parameters_of_any_layout(foreach: bool | None) -> None:
    """Weights and gradients that lie differently in memory have AdamW's step, too."""
    torch.manual_seed(0)
    weight, options = torch.randn(4, 3, 2, 2), {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True}
    layouts = (torch.contiguous_format, torch.channels_last)
    for of_weight, of_grad in ((a, b) for a in layouts for b in layouts):
        p, q = nn.Parameter(weight.contiguous(memory_format=of_weight)), nn.Parameter(weight.clone())
        opts = LazyAdam([p], foreach=foreach, **options), torch.optim.AdamW([q], **options)  # type: ignore[arg-type]
        for _ in range(3):
            grad = torch.randn(4, 3, 2, 2)
            p.grad, q.grad = grad.contiguous(memory_format=of_grad), grad
            for opt in opts:
                opt.step()
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("bias", ["global", "row"])
def test_a_table_whose_gradient_is_sometimes_dense(bias: Any) -> None:
    """As a penalty in some steps makes it: when every row is seen in every step it is Adam, and counted."""
    net, right = Net(), Net(sparse=False)
    opt = LazyAdam(net.parameters(), 0.05, semantics="decay", bias_correction=bias, count_rows=True)
    adam = torch.optim.Adam(right.parameters(), 0.05)
    every = torch.arange(1, 12)
    for i in range(7):
        for model, each in ((net, opt), (right, adam)):
            each.zero_grad()
            loss = model(every) * (-1) ** (i // 2)
            (loss + model.table.weight[1:].square().sum() if i % 3 == 1 else loss).backward()
            each.step()
    for p, q in zip(net.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert row_report(opt).tables[0].counts[1:].tolist() == [7] * 11


def test_a_dense_gradient_makes_up_for_steps_that_missed_a_row() -> None:
    """Under "decay" its averages have faded meanwhile."""
    net, right = Net(), Net(sparse=False)
    opt, adam = LazyAdam(net.parameters(), 0.05, semantics="decay"), torch.optim.Adam(right.parameters(), 0.05)
    for rows, dense in ((torch.tensor([1, 2]), False), (torch.tensor([2]), False), (torch.tensor([3]), True)):
        for model, each in ((net, opt), (right, adam)):
            each.zero_grad()
            loss = model(rows)
            (loss + model.table.weight.sum() if dense else loss).backward()
            each.step()
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(opt.state[net.table.weight][name], adam.state[right.table.weight][name])


def test_state_that_is_missing_or_of_another_kind() -> None:
    """Refused where it cannot be, made where it was not needed before."""
    net = Net()
    opt = LazyAdam(net.parameters(), semantics="decay")
    train(net, opt, batches(2))
    saved = opt.state_dict()
    for name, value, message in (
        ("exp_avg", None, "exp_avg of parameter 0 must be a tensor, got None"),
        ("step", 3, "step of parameter 0 must be a tensor, got 3"),
        ("last", torch.zeros(3), r"last of parameter 0 has shape \(3,\), wanted \(12,\)"),
        ("last", torch.zeros(12), "last of parameter 0 is of dtype torch.float32, wanted an integer one"),
    ):
        broken = copy.deepcopy(saved)
        broken["state"][0][name] = value
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(broken)
    broken = copy.deepcopy(saved)
    broken["param_groups"][0]["lr"] = -1
    with pytest.raises(ValueError, match="lr must be a finite number from 0, got -1"):
        opt.load_state_dict(broken)
    counting = LazyAdam(net.parameters(), count_rows=True)
    counting.load_state_dict(saved)
    train(net, counting, [torch.tensor([4])])
    assert int(row_report(counting).tables[0].counts[4]) == 1
    plain = Net()
    opt = LazyAdam(plain.parameters())
    train(plain, opt, batches(2))
    opt.param_groups[0] |= {"semantics": "decay", "bias_correction": "row", "amsgrad": True}
    train(plain, opt, batches(2))
    for dtype in (torch.bfloat16, torch.float64):
        plain.table.to(dtype)
        plain.head.to(dtype)
        train(plain, opt, batches(1))
        assert all(p.isfinite().all() for p in plain.parameters())
    frozen = Net()
    frozen.table.requires_grad_(False)
    opt = LazyAdam(frozen.parameters())
    set_optimizer_state_dict(frozen, opt, get_optimizer_state_dict(frozen, opt))
    frozen.table.requires_grad_()
    train(frozen, opt, batches(2))
