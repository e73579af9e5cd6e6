"""Lookahead against the algorithm as the paper writes it, and against all that torch asks of an optimizer."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, Optimizer, RMSprop, SparseAdam

from pyseq.optim import Lookahead

ROOM = "lookahead"
Make = Callable[[Any], Optimizer]
INNER: dict[str, Make] = {
    "SGD": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(
        p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=1e-2
    ),  # whose first step is unlike the others
    "AdamW": lambda p: AdamW(p, lr=0.05),
    "fused": lambda p: AdamW(p, lr=0.05, fused=True),
    "amsgrad": lambda p: Adam(p, lr=0.05, amsgrad=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
    "Adagrad": lambda p: Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
}
every_inner = pytest.mark.parametrize("inner", INNER)


def net(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def step(model: nn.Module, opt: Optimizer, i: int) -> Tensor:
    """One on the i-th batch of a stream."""
    generator = torch.Generator().manual_seed(i)
    p = next(model.parameters())
    x = torch.randn(8, 5, generator=generator).to(p)
    opt.zero_grad()
    loss: Tensor = model(x).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    opt.step()
    return loss.detach()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, weights(a), weights(b)))


@every_inner
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (3, 0.3), (2, 0.8)])
def test_the_trajectory_is_the_papers(inner: str, k: int, alpha: float) -> None:
    """Slow weights start at the weights before the first step, and every parameter takes part."""
    model, plain = net(torch.float64), net(torch.float64)
    opt, bare = Lookahead(INNER[inner](model.parameters()), k, alpha), INNER[inner](plain.parameters())
    assert isinstance(opt, Optimizer)
    slow = weights(plain)
    for i in range(7):
        assert torch.equal(step(model, opt, i), step(plain, bare, i))
        if (i + 1) % k == 0:
            slow = [y.lerp(x, alpha) for x, y in zip(weights(plain), slow, strict=True)]
            for p, y in zip(plain.parameters(), slow, strict=True):
                p.data.copy_(y)
        torch.testing.assert_close(weights(model), weights(plain), rtol=1e-14, atol=1e-14)
        for p in plain.parameters():  # rounded in another order, within the line above
            p.data.copy_(dict(zip(plain.parameters(), weights(model), strict=True))[p])


def test_a_quadratic_by_hand() -> None:
    w = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))
    opt, found = Lookahead(SGD([w], lr=0.1), k=3), []
    for _ in range(9):
        opt.zero_grad()
        (w**2).backward()  # type: ignore[no-untyped-call]
        opt.step()
        found.append(w.item())
    wanted = [3.2, 2.56, 3.024, 2.4192, 1.93536, 2.286144, 1.8289152, 1.46313216, 1.72832486]
    assert found == pytest.approx(wanted, abs=1e-8)


def test_ends_of_alpha() -> None:
    """At 1 every step is the inner optimizer's, bit for bit; at 0 each cycle ends where it began."""
    model, plain = net(), net()
    opt, bare = Lookahead(AdamW(model.parameters()), 1, 1.0), AdamW(plain.parameters())
    for i in range(4):
        step(model, opt, i), step(plain, bare, i)
        assert same(model, plain)
    before = weights(model)
    still = Lookahead(AdamW(model.parameters()), 3, 0.0)
    for i in range(6):
        step(model, still, i)
        assert all(map(torch.equal, weights(model), before)) == (i % 3 == 2)


def test_slow_weights_are_taken_before_the_first_step_and_anew() -> None:
    """After weights were loaded or replaced; `restart` begins a cycle; a parameter without gradient takes part."""
    model, other = net(), net()
    opt = Lookahead(SGD(model.parameters(), lr=0.1), k=2)
    other.load_state_dict({k: x + 1 for k, x in model.state_dict().items()})
    model.load_state_dict(other.state_dict())
    before = weights(model)
    step(model, opt, 0)
    middle = weights(model)
    model[2].bias.data.add_(1)
    for p in model.parameters():
        p.grad = None
    opt.step()  # synchronises; the inner one moves nothing
    middle[-1].add_(1)
    torch.testing.assert_close(weights(model), [y.lerp(x, 0.5) for x, y in zip(middle, before, strict=True)])
    step(model, opt, 1)
    opt.restart()
    assert opt.param_groups[0]["lookahead_step"] == 0
    start = weights(model)
    step(model, opt, 2)
    for x, p in zip(start, model.parameters(), strict=True):
        assert torch.equal(opt.state[p]["lookahead_slow"], x)
    replaced = [nn.Parameter(p.detach().clone()) for p in model.parameters()]  # as accelerate does for FSDP2
    fresh = Lookahead(AdamW(model.parameters()), k=1)
    fresh.param_groups[0]["params"] = replaced
    replaced[0].grad = torch.ones_like(replaced[0])
    fresh.step()
    assert {*fresh.state} == {*replaced}


@every_inner
@pytest.mark.parametrize("momentum", ["keep", "reset", "pullback"])
@pytest.mark.parametrize("way", ["state_dict", "weights_only", "deepcopy", "pickle"])
def test_resumes_in_mid_cycle(inner: str, momentum: Any, way: str, tmp_path: Path) -> None:
    model = net()
    opt = Lookahead(INNER[inner](model.parameters()), k=3, momentum=momentum)
    for i in range(4):
        step(model, opt, i)
    if way == "deepcopy":
        twin, again = copy.deepcopy((model, opt))
    elif way == "pickle":
        twin, again = pickle.loads(pickle.dumps((model, opt)))
    else:
        twin = copy.deepcopy(model)
        again = Lookahead(INNER[inner](twin.parameters()), k=7, alpha=0.1, momentum=momentum)
        saved = copy.deepcopy(opt.state_dict())
        if way == "weights_only":
            torch.save(saved, tmp_path / "opt.pt")
            saved = torch.load(tmp_path / "opt.pt", weights_only=True)
        again.load_state_dict(saved)
    for i in range(4, 11):
        step(model, opt, i), step(twin, again, i)
        assert same(model, twin)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("inner", ["SGD", "momentum", "AdamW", "Adagrad"])
@pytest.mark.parametrize("momentum", ["keep", "pullback"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # dcp's, about one process
def test_distributed_checkpoint(flat: bool, inner: str, momentum: Any, tmp_path: Path) -> None:
    """get, dcp.load, set, into a fresh object; asking changes nothing."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = net()
    opt = Lookahead(INNER[inner](model.parameters()), k=3, momentum=momentum)
    for i in range(5):
        step(model, opt, i)
    save({"opt": get_optimizer_state_dict(model, opt, options=options)}, checkpoint_id=tmp_path)
    twin = copy.deepcopy(model)
    again = Lookahead(INNER[inner](twin.parameters()), k=2, momentum=momentum)
    state = {"opt": get_optimizer_state_dict(twin, again, options=options)}
    load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, again, state["opt"], options=options)
    for i in range(5, 11):
        step(model, opt, i), step(twin, again, i)
        assert same(model, twin)


@every_inner
@pytest.mark.parametrize("momentum", ["keep", "pullback"])
def test_asking_a_fresh_one_for_its_state_changes_nothing(inner: str, momentum: Any) -> None:
    model, twin = net(), net()
    opt, other = (Lookahead(INNER[inner](m.parameters()), k=2, momentum=momentum) for m in (model, twin))
    asked: Any = get_optimizer_state_dict(model, opt)["state"]
    for _ in range(3):
        step(twin, other, 0)
    made: Any = get_optimizer_state_dict(twin, other)["state"]
    assert {k: {*v} for k, v in asked.items()} == {k: {*v} for k, v in made.items()}
    model, twin = net(), net()
    opt, other = (Lookahead(INNER[inner](m.parameters()), k=2, momentum=momentum) for m in (model, twin))
    get_optimizer_state_dict(model, opt)
    get_optimizer_state_dict(model, opt)
    assert same(model, twin)
    for i in range(5):
        step(model, opt, i), step(twin, other, i)
        assert same(model, twin)


def test_schedulers_reach_the_inner_rate_also_after_loading() -> None:
    model = net()
    opt = Lookahead(SGD(model.parameters(), lr=1.0), k=2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    step(model, opt, 0)
    scheduler.step()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.param_groups is opt.optimizer.param_groups
    step(model, opt, 1)
    scheduler.step()
    assert opt.optimizer.param_groups[0]["lr"] == 0.25


def test_groups_have_their_own_k_and_alpha() -> None:
    """Also beside an `alpha` of the inner optimizer's; a later group starts at its weights of then, on one clock."""
    a, b, c = (nn.Parameter(torch.full((2,), 8.0)) for _ in range(3))
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "lookahead_k": 3, "lookahead_alpha": 0.25}]
    inner = RMSprop(groups, lr=1.0, alpha=0.5)
    opt = Lookahead(inner, k=2, alpha=0.5)
    assert [group["alpha"] for group in opt.param_groups] == [0.5, 0.5]
    opt.add_param_group({"params": [c]})
    moved = []
    for i in range(6):
        if i == 1:
            c.data.fill_(4.0)
            opt.param_groups.pop()
            opt.add_param_group({"params": [c]})
        for p in (a, b, c):
            p.grad = torch.zeros(2)
            p.data.add_(1.0)
        opt.step()
        moved.append((a[0].item(), b[0].item(), c[0].item()))
    assert moved == [
        (9, 9, 9), (9.5, 10, 4.5), (10.5, 9.5, 5.5), (10.5, 10.5, 5.5), (11.5, 11.5, 6.5), (11.5, 10.25, 6.5)
    ]  # fmt: skip


def test_closures_hooks_and_zero_grad() -> None:
    model, seen = net(), []
    opt = Lookahead(torch.optim.LBFGS(model.parameters(), max_iter=2), k=2)
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda o, d: seen.append(d.pop("extra")))
    x = torch.ones(2, 5)

    def closure() -> Tensor:
        opt.zero_grad(set_to_none=True)
        loss: Tensor = model(x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    first = closure()
    assert torch.equal(opt.step(closure), first)
    assert seen == ["pre", "post"]
    opt.load_state_dict(opt.state_dict())
    assert seen == ["pre", "post", 1]
    opt.zero_grad(set_to_none=False)
    assert not any(p.grad is None or p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_do_not_count(fused: bool) -> None:
    model, plain = net(), net()
    opt, other = (Lookahead(AdamW(m.parameters(), lr=0.1, fused=fused), k=2) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(5):
        opt.zero_grad()
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(i))
        scaler.scale(model(x).square().mean()).backward()
        if i == 1:
            next(model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
        else:
            step(plain, other, i)
        scaler.step(opt)
        scaler.update()
        assert opt.param_groups[0]["lookahead_step"] == i + (i < 1)
    torch.testing.assert_close(weights(model), weights(plain))


def test_reset_makes_the_inner_optimizer_a_fresh_one() -> None:
    for inner in INNER.values():
        model, twin = net(), net()
        opt = Lookahead(inner(model.parameters()), k=3, alpha=0.5, momentum="reset")
        for i in range(3):
            step(model, opt, i)
        twin.load_state_dict(model.state_dict())
        bare = inner(twin.parameters())
        for i in range(2):
            step(model, opt, i), step(twin, bare, i)
            assert same(model, twin)


def test_pullback_moves_momenta_as_weights() -> None:
    """From zero; each state of a parameter's shape, but no step count; without aliasing."""
    model = net(torch.float64)
    opt = Lookahead(Adam(model.parameters(), lr=0.1, amsgrad=True), k=2, alpha=0.25, momentum="pullback")
    last = {
        (p, name): torch.zeros_like(p)
        for p in model.parameters()
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    }
    spy: dict[Any, Tensor] = {}
    opt.optimizer.register_step_post_hook(
        lambda o, *_: spy.update({key: o.state[key[0]][key[1]].clone() for key in last})
    )
    for i in range(6):
        step(model, opt, i)
        if i % 2:
            for key in last:
                last[key] = last[key].lerp(spy[key], 0.25)
                torch.testing.assert_close(opt.optimizer.state[key[0]][key[1]], last[key], rtol=1e-13, atol=0)
        assert {float(opt.optimizer.state[p]["step"]) for p in model.parameters()} == {i + 1.0}
    momentum = SGD(model.parameters(), lr=0.1, momentum=0.9)
    pulled = Lookahead(momentum, k=1, alpha=0.5, momentum="pullback")
    step(model, pulled, 0)
    for p in model.parameters():
        torch.testing.assert_close(momentum.state[p]["momentum_buffer"], 0.5 * p.grad)  # type: ignore[operator]


def test_half_precision_keeps_a_float32_copy() -> None:
    """Which loading does not round, and the fast weights are its rounding."""
    model = net(torch.bfloat16)
    opt = Lookahead(SGD(model.parameters(), lr=1e-2), k=2, alpha=0.3)
    for i in range(4):
        step(model, opt, i)
    twin = copy.deepcopy(model)
    again = Lookahead(SGD(twin.parameters(), lr=1e-2), k=2)
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        slow = opt.state[p]["lookahead_slow"]
        assert slow.dtype == torch.float32
        assert not torch.equal(slow, slow.bfloat16().float())
        assert torch.equal(p, slow.bfloat16())
        assert torch.equal(again.state[q]["lookahead_slow"], slow)
        assert again.state[q]["lookahead_slow"] is not slow


def test_slow_weights_for_evaluation() -> None:
    model = net()
    opt = Lookahead(AdamW(model.parameters(), lr=0.1), k=3)
    with opt.slow_weights():
        assert same(model, net())
    step(model, opt, 0)
    fast = weights(model)
    inside: list[bool] = []
    with pytest.raises(RuntimeError, match="no step inside slow_weights"), opt.slow_weights():  # noqa: PT012
        inside += [same(model, net()), len(opt.state_dict()["state"]) == 4]
        opt.step()
    assert inside == [True, True]
    assert all(map(torch.equal, weights(model), fast))
    step(model, opt, 1)  # is allowed again


def test_sparse_gradients() -> None:
    table = nn.Embedding(6, 3, sparse=True)
    opt = Lookahead(SparseAdam(table.parameters(), lr=0.1), k=2)
    get_optimizer_state_dict(table, opt)
    start = table.weight.detach().clone()
    for rows in ([0, 1], [1, 1]):
        opt.zero_grad()
        table(torch.tensor(rows)).sum().backward()
        opt.step()
    assert torch.equal(table.weight[2:], start[2:])
    assert opt.state[table.weight]["step"] == 2
    assert (table.weight[:2] != start[:2]).all()


def test_muon_and_frozen_parameters() -> None:
    matrix, frozen = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(3, 3), requires_grad=False)
    opt = Lookahead(Muon([matrix, frozen], lr=0.1), k=2, momentum="pullback")
    for _ in range(2):
        matrix.grad = torch.randn(4, 4)
        opt.step()
    assert frozen.eq(1).all()
    assert torch.equal(matrix, opt.state[matrix]["lookahead_slow"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # dynamo's own
def test_compiled_steps() -> None:
    model, plain = net(), net()
    opt, other = (Lookahead(AdamW(m.parameters(), lr=0.1), k=2) for m in (model, plain))
    torch.compiler.reset()
    compiled = torch.compile(lambda: opt.step(), backend="aot_eager")
    for i in range(5):
        for m in (model, plain):
            m.zero_grad()
            m(torch.ones(2, 5) * i).square().mean().backward()
        compiled(), other.step()
        torch.testing.assert_close(weights(model), weights(plain))
    torch.compiler.reset()


def test_two_processes(on_two: Callable[[str], None]) -> None:
    """DDP and FSDP2 follow one process; FSDP2 resumes from a distributed checkpoint."""
    on_two("lookahead_on_two.py")


def test_wrong_arguments() -> None:
    p = nn.Parameter(torch.ones(2))
    for k in (2.0, True, "3", None):
        with pytest.raises(TypeError, match="k must be an integer and alpha a number, got"):
            Lookahead(SGD([p], lr=0.1), k=k)  # type: ignore[arg-type]
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            Lookahead(SGD([p], lr=0.1), k=k)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
            Lookahead(SGD([p], lr=0.1), alpha=alpha)
    numpys = Lookahead(SGD([p], lr=0.1), k=np.int64(3), alpha=np.float32(0.5)).param_groups[0]  # type: ignore[arg-type]
    assert [type(numpys[f"lookahead_{name}"]) for name in ("k", "alpha")] == [int, float]
    with pytest.raises(ValueError, match="momentum must be 'keep', 'reset' or 'pullback', got 'pull'"):
        Lookahead(SGD([p], lr=0.1), momentum="pull")  # type: ignore[arg-type]
    for what in ([p], Lookahead(SGD([p], lr=0.1))):
        with pytest.raises(TypeError, match=r"optimizer must be an optimizer such as .*, no Lookahead, got"):
            Lookahead(what)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"parameters must be real and floating, got one of torch\.complex64"):
        Lookahead(SGD([nn.Parameter(torch.ones(2) + 0j)], lr=0.1))
    opt = Lookahead(SGD([p], lr=0.1))
    with pytest.raises(ValueError, match="k must be at least 1"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lookahead_k": 0})
    assert len(opt.param_groups) == 1


def test_an_optimizer_wrapped_again_takes_the_new_arguments() -> None:
    given: Any = [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [], "lookahead_k": 7}]
    inner = SGD(given, lr=0.1)
    for k in (5, 2):
        groups = Lookahead(inner, k=k, alpha=0.1 * k).param_groups
        assert [group["lookahead_k"] for group in groups] == [k, 7 if k == 5 else k]
        assert groups[0]["lookahead_alpha"] == 0.1 * k


def test_groups_that_went_wrong_refuse_before_anything_moves() -> None:
    model = net()
    opt = Lookahead(SGD(model.parameters(), lr=0.1), k=2)
    step(model, opt, 0)
    before, group = weights(model), opt.param_groups[0]
    for name, bad in (("lookahead_k", 0), ("lookahead_k", 2.5), ("lookahead_alpha", "x"), ("lookahead_alpha", 5.0)):
        kept, group[name] = group[name], bad
        with pytest.raises((ValueError, TypeError), match=r"k must be|alpha must"):
            step(model, opt, 1)
        group[name] = kept
    group["params"].append(nn.Parameter(torch.ones(1) + 0j))
    with pytest.raises(TypeError, match="parameters must be real and floating"):
        step(model, opt, 1)
    assert all(map(torch.equal, weights(model), before))
    assert group["lookahead_step"] == 1


def test_a_module_that_changes_its_dtype_takes_its_slow_weights_along() -> None:
    model = net()
    opt = Lookahead(SGD(model.parameters(), lr=0.1), k=2)
    step(model, opt, 0)
    model.double()
    step(model, opt, 1)
    slow = opt.state[model[0].weight]["lookahead_slow"]
    assert slow.dtype == torch.float64
    assert torch.equal(slow, model[0].weight)


class Odd(Optimizer):
    """What third parties do: an attribute that steps read, a count in the group, state by name, dicts of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.factor, self.loaded = 0.5, 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["all"] = 1  # type: ignore[index]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("lookahead_momentum", torch.zeros_like(p))
                if p.grad is not None:
                    state["lookahead_momentum"].mul_(self.factor).add_(p.grad)
                    p.data.sub_(state["lookahead_momentum"], alpha=group["lr"] / group["step"])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mine": self.factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.factor, self.loaded = state_dict.get("mine", self.factor), self.loaded + 1


@pytest.mark.parametrize("momentum", ["keep", "reset", "pullback"])
@pytest.mark.parametrize("before", [2, 3])  # 3: at a synchronisation
@pytest.mark.parametrize("inner", ["Odd", "AdamW", "momentum"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # dcp's, about one process
def test_third_parties_and_resets_resume_too(inner: str, before: int, momentum: Any, tmp_path: Path) -> None:
    make: Any = Odd if inner == "Odd" else INNER[inner]
    model = net()
    opt = Lookahead(make(model.parameters()), k=3, momentum=momentum)
    for i in range(before):
        step(model, opt, i)
    plain, distributed = copy.deepcopy(model), copy.deepcopy(model)
    again, other = (Lookahead(make(m.parameters()), momentum=momentum) for m in (plain, distributed))
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    if inner == "Odd":
        assert opt.state_dict()["mine"] == 0.5
        assert again.optimizer.loaded == 1  # type: ignore[attr-defined]
    else:
        save({"opt": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
        state = {"opt": get_optimizer_state_dict(distributed, other)}
        load(state, checkpoint_id=tmp_path)
        set_optimizer_state_dict(distributed, other, state["opt"])
    for i in range(before, 9):
        step(model, opt, i), step(plain, again, i)
        assert same(model, plain)
        if inner != "Odd":  # dcp knows no state but of parameters
            step(distributed, other, i)
            assert same(model, distributed)
    assert {"lookahead_momentum", "lookahead_slow"} <= {*opt.state_dict()["state"][0]} or inner != "Odd"


def test_reset_also_resets_a_count_in_the_group() -> None:
    model, twin = net(), net()
    opt = Lookahead(Odd(model.parameters()), k=3, momentum="reset")
    for i in range(3):
        step(model, opt, i)
    twin.load_state_dict(model.state_dict())
    bare = Odd(twin.parameters())
    for i in range(2):
        step(model, opt, i), step(twin, bare, i)
        assert same(model, twin)


def test_state_is_a_view() -> None:
    model = net()
    opt, p = Lookahead(AdamW(model.parameters())), model[0].weight
    for change in (
        lambda: opt.state.__setitem__(p, {}),
        lambda: opt.state.__delitem__(p),
        lambda: opt.state.clear(),
        lambda: setattr(opt, "state", {}),
    ):
        with pytest.raises(TypeError, match=r"this is a view; change opt\.optimizer\.state"):
            change()


def test_wrong_states_and_refused_steps_change_nothing() -> None:
    model = net()
    opt = Lookahead(AdamW(model.parameters(), lr=0.1), k=2)
    step(model, opt, 0)
    before = copy.deepcopy(opt.state_dict())
    narrow = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    others = {
        "no Lookahead's state": AdamW(model.parameters()).state_dict(),
        "another optimizer than AdamW: it has dampening, momentum, nesterov": Lookahead(
            SGD(model.parameters(), lr=0.1)
        ).state_dict(),
        "different number of parameter groups": {**before, "param_groups": before["param_groups"] * 2},
    }
    other = Lookahead(AdamW(narrow.parameters()))
    narrow(torch.ones(1, 2)).sum().backward()
    other.step()
    others[r"lookahead_slow of parameter 0 has shape \(4, 2\), wanted \(4, 5\)"] = other.state_dict()
    for odd in (dict[str, Any](), None):
        with pytest.raises(TypeError, match="must be a dict with state and param_groups"):
            opt.load_state_dict(odd)  # type: ignore[arg-type]
    lost = {**before, "state": {i: {"step": x["step"]} for i, x in before["state"].items()}}
    others["lookahead_slow is missing for parameter 0"] = lost
    for message, state in others.items():
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)
    fast = weights(model)

    def refuse(*_: Any) -> None:
        raise ArithmeticError

    handle = opt.optimizer.register_step_pre_hook(refuse)
    with pytest.raises(ArithmeticError):
        opt.step()
    handle.remove()
    assert all(map(torch.equal, weights(model), fast))
    now = opt.state_dict()
    assert now["param_groups"] == before["param_groups"]
    for i, entries in before["state"].items():
        assert all(torch.equal(now["state"][i][name], x) for name, x in entries.items())
