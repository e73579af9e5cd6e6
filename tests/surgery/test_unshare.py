"""Copies instead of shared modules: the same bits, exact relations of gradients and optimizers, and the way back."""

import copy
import io
import pickle
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close as close
from torch.utils.checkpoint import checkpoint

from pyseq import optim
from pyseq.surgery import drift_report, reshare, state_dict, unshare
from pyseq.surgery._albert import group_a_layer
from pyseq.surgery._calls import PerCall, count_calls

ROOM = "surgery"
pytestmark = pytest.mark.usefixtures("one_thread")
DIM, LAYERS = 4, 4
exactly = partial(close, rtol=0, atol=0)
X = torch.linspace(-1, 1, 6 * DIM).view(6, DIM)


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.dense, self.drop = config, nn.Linear(DIM, DIM), nn.Dropout(0.3)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.dense(x)).tanh()  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Its two linear maps are tied."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention, self.ffn, self.ffn_output = Attention(config), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.ffn_output.weight = self.ffn.weight
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return self.norm(x + self.ffn_output(self.ffn(x).relu()))  # type: ignore[no-any-return]


class Group(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.albert_layers = nn.ModuleList([Layer(config) for _ in range(config.inner_group_num)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.albert_layers:
            x = layer(x)
        return x


class Albert(nn.Module):
    """The layout of transformers' encoder."""

    def __init__(self, groups: int = 1, inner: int = 1) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(num_hidden_layers=LAYERS, num_hidden_groups=groups, inner_group_num=inner)
        self.albert_layer_groups = nn.ModuleList([Group(self.config) for _ in range(groups)])

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.config.num_hidden_layers):
            x = self.albert_layer_groups[int(i / (LAYERS / self.config.num_hidden_groups))](x)
        return x


class Within(nn.Module):
    """An encoder between an embedding and a head that is tied to it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.words, self.encoder, self.head = nn.Linear(DIM, DIM), encoder, nn.Linear(DIM, DIM)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(x)))  # type: ignore[no-any-return]


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.relu = Layer(None), nn.ReLU()

    def forward(self, x: Tensor, calls: int = LAYERS) -> Tensor:
        for _ in range(calls):
            x = self.relu(self.block(x))
        return x


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.tower(left) - self.tower(right).exp()  # type: ignore[no-any-return]


def aliases() -> nn.Module:
    return nn.Sequential(*[Layer(None)] * LAYERS)


def within(encoder: Callable[[], nn.Module], **options: Any) -> Callable[[], Any]:
    return lambda: Within(encoder(**options))


MODELS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "aliases": (aliases, None, "{}"),
    "aliases inside": (within(aliases), None, "encoder.{}"),
    "loop": (Loop, X, "block.{}"),
    "loop inside": (within(Loop), X, "encoder.block.{}"),
    "albert": (Albert, None, "albert_layer_groups.{}.albert_layers.0"),
    "albert inside": (within(Albert), None, "encoder.albert_layer_groups.{}.albert_layers.0"),
}
every = pytest.mark.parametrize("kind", MODELS)
inside = pytest.mark.parametrize("kind", [kind for kind in MODELS if "inside" in kind])


def built(kind: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    build, example, _ = MODELS[kind]
    return build(), {"example": example}


def copies(model: Any, kind: str, inner: str = "") -> list[Any]:
    return [model.get_submodule(MODELS[kind][2].format(i) + inner) for i in range(LAYERS)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def output(model: Any, *args: Any) -> Tensor:
    torch.manual_seed(1)
    return model(*args or (X,))  # type: ignore[no-any-return]


def same_outputs(model: Any, wanted: Any) -> None:
    """In eval, and in training with dropout from one seed; models stay as they were."""
    for training in (False, True):
        mine, other = (copy.deepcopy(x).train(training) for x in (model, wanted))
        exactly(output(mine), output(other))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@every
def test_full(kind: str) -> None:
    model, options = built(kind)
    before, ones = state(model), copies(model, kind) if "aliases" in kind else []
    apart: Any = unshare(model, **options)
    exactly(state(model), before)
    assert len({*ones}) <= 1
    assert not model._forward_hooks
    found = copies(apart, kind)
    assert len({*found}) == len({x.ffn.weight for x in found}) == len({x.attention.count for x in found}) == LAYERS
    assert all(x.ffn.weight is x.ffn_output.weight for x in found)
    assert not {*apart.parameters()} & {*model.parameters()}
    if "inside" in kind:
        assert apart.head.weight is apart.words.weight
    same_outputs(apart, model)
    block = size(found[0])
    assert size(apart) == size(model) + (LAYERS - 1) * block
    assert str(apart._unshared).endswith(f"{LAYERS} calls, {LAYERS} copies; parameters {size(model)} -> {size(apart)}")
    torch.optim.SGD(apart.parameters(), lr=0.1).step(lambda: output(apart).square().sum().backward())  # type: ignore
    assert len({x.ffn.weight.sum().item() for x in found}) == LAYERS


@every
def test_again_and_back(kind: str) -> None:
    """Un-sharing again changes nothing; re-sharing gives the bits and the layout back, and un-sharing them again."""
    model, options = built(kind)
    apart = unshare(model, **options)
    for again in (unshare(apart, **options), unshare(apart)):
        exactly(state(again), state(apart))
        assert again._unshared == apart._unshared
        same_outputs(again, apart)
    joined: Any = reshare(apart)
    assert [*joined.state_dict()] == [*model.state_dict()]
    exactly(state(joined), state(model))
    assert [n for n, _ in joined.named_modules()] == [n for n, _ in model.named_modules()]
    assert not hasattr(joined, "_unshared")
    assert not joined._forward_hooks
    assert not joined._forward_pre_hooks
    same_outputs(joined, model)
    exactly(state(unshare(joined, **options)), state(apart))
    if "albert" in kind:
        config = (joined.encoder if "inside" in kind else joined).config
        assert config.num_hidden_groups == 1
    with pytest.raises(ValueError, match="nothing in this model was un-shared"):
        reshare(joined)


@every
@pytest.mark.parametrize(("inner", "other"), [(".attention", ".ffn"), (".ffn*", ".attention.dense")])
def test_parts(kind: str, inner: str, other: str) -> None:
    """Attention only, and feed-forward only; the rest of the block stays one, and may follow later."""
    model, options = built(kind)
    apart = unshare(model, f"*{inner}" if "loop" not in kind else f"*block{inner}", **options)
    same_outputs(apart, model)
    added = (LAYERS - 1) * size(getattr(copies(unshare(model, **options), kind)[0], inner[1:].rstrip("*")))
    if inner == ".attention":
        assert size(apart) == size(model) + added
    else:  # the tie between the two is to what is outside of either
        assert size(model) < size(apart) < size(model) + added
    joined = reshare(apart)
    assert [n for n, _ in joined.named_modules()] == [n for n, _ in model.named_modules()]
    same_outputs(joined, model)
    rest = unshare(apart, **options)
    assert size(rest) > size(apart)
    same_outputs(rest, model)
    joined = reshare(rest)
    exactly(state(joined), state(model))
    same_outputs(joined, model)


@inside
@pytest.mark.parametrize(
    ("asked", "wanted"),
    [({"groups": 1}, "0000"), ({"groups": 2}, "0011"), ({"groups": 3}, "0012"), ({"groups": 4}, "0123"),
     ({"layers": range(2)}, "0122"), ({"layers": [1]}, "0100"), ({"layers": [3, 0]}, "0112")],
    ids=str,
)  # fmt: skip
def test_some_calls_share_on(kind: str, asked: Any, wanted: str) -> None:
    model, options = built(kind)
    apart: Any = unshare(model, **options, **asked)
    if asked != {"groups": 1}:
        with _expanded(apart):
            found = copies(apart, kind)
        assert [[*dict.fromkeys(found)].index(x) for x in found] == [int(i) for i in wanted]
    same_outputs(apart, model)
    again = unshare(apart, **options, **asked)
    assert size(again) == size(apart)
    same_outputs(again, model)
    full = unshare(apart, **options)
    assert size(full) == size(unshare(model, **options))
    same_outputs(full, model)
    if asked != {"groups": 1}:
        exactly(state(reshare(full)), state(model))
        exactly(state(reshare(apart)), state(model))


def _expanded(model: Any) -> Any:
    return group_a_layer(model, shorten=False)


@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_albert_keeps_its_layout(groups: int, inner: int) -> None:
    model: Any = Within(Albert(groups, inner))
    for asked, wanted in (({}, LAYERS), ({"groups": 2}, 2), ({"pattern": "*.attention"}, LAYERS)):
        apart: Any = unshare(model, **asked)  # type: ignore[arg-type]
        assert len(apart.encoder.albert_layer_groups) == apart.encoder.config.num_hidden_groups == wanted
        assert apart.encoder.albert_layer_groups[-1].albert_layers[-1].attention.config is apart.encoder.config
        assert model.encoder.config.num_hidden_groups == len(model.encoder.albert_layer_groups) == groups
        same_outputs(apart, model)
        if "pattern" in asked or wanted > groups:
            joined: Any = reshare(apart)
            exactly(state(joined), state(model))
            assert joined.encoder.config.num_hidden_groups == groups
    del apart._unshared
    joined = reshare(apart)
    assert len(joined.encoder.albert_layer_groups) == 1


def test_checkpoints_of_a_list_fit_both_ways() -> None:
    """Names are the same; of copies that differ the last one wins, as torch has it."""
    model: Any = aliases()
    apart: Any = unshare(model)
    assert [*apart.state_dict()] == [*model.state_dict()]
    nn.init.zeros_(apart[-1].norm.weight)
    model.load_state_dict(apart.state_dict())
    exactly(model[0].norm.weight, apart[-1].norm.weight)


def test_an_example_adds_what_is_called_repeatedly() -> None:
    """An ALBERT has its own layout still, and a loop elsewhere is found in the same pass."""
    model = nn.Sequential(Albert(), Loop())
    apart: Any = unshare(model, example=X)
    assert len(apart[0].albert_layer_groups) == len(apart[1].block) == LAYERS
    assert str(apart._unshared).count("4 calls, 4 copies") == 2
    same_outputs(apart, model)
    same_outputs(reshare(apart), model)
    exactly(state(unshare(apart, example=X)), state(apart))


def test_two_encoders_of_one_config() -> None:
    left, right = Albert(), Albert()
    right.config = left.config
    model = nn.Sequential(left, right)
    apart: Any = unshare(model, "1.albert_layer_groups.0")
    assert len({*apart[0].albert_layer_groups}) == 1
    assert len({*apart[1].albert_layer_groups}) == LAYERS
    same_outputs(apart, model)
    same_outputs(reshare(apart), model)


def test_what_stays_shared() -> None:
    """A parameter that the block has in common with another module, a module without parameters, and a tied head."""
    model: Any = within(aliases)()
    model.encoder[0].attention.dense.weight = model.words.weight
    model.relu = nn.Sequential(*[nn.ReLU()] * 2)
    apart: Any = unshare(model)
    assert {x.attention.dense.weight for x in apart.encoder} == {apart.words.weight} == {apart.head.weight}
    assert len({x.attention.dense.bias for x in apart.encoder}) == LAYERS
    assert apart.relu[0] is apart.relu[1]
    joined: Any = reshare(apart)
    assert joined.encoder[3].attention.dense.weight is joined.head.weight


def test_inner_sharing_stays_inside_each_copy() -> None:
    block: Any = nn.Sequential(*[nn.Linear(DIM, DIM)] * 2)
    apart: Any = unshare(nn.Sequential(block, block))
    again: Any = unshare(apart)
    for model in (apart, again):
        assert model[0][0] is model[0][1] is not model[1][0]
    deeper: Any = unshare(apart, "*.*")
    assert deeper[0][0] is not deeper[0][1]
    assert len({*deeper.parameters()}) == 8


def test_frozen_parameters_hooks_and_modes_are_copied() -> None:
    model = within(aliases)()
    block, seen = model.encoder[0], []
    block.ffn.requires_grad_(False)
    block.eval()
    block.register_forward_hook(lambda module, args, output: seen.append(module))
    apart: Any = unshare(model)
    apart(X)
    assert seen == [*apart.encoder]
    assert all(not x.ffn.weight.requires_grad and x.norm.weight.requires_grad and not x.training for x in apart.encoder)


def test_attributes_and_towers() -> None:
    model: Any = nn.Module()
    model.left = model.right = nn.Linear(2, 2)
    apart: Any = unshare(model)
    assert apart.left is not apart.right
    exactly(apart.left.weight, apart.right.weight)
    towers = Siamese()
    example = {"left": X, "right": X + 1}
    apart = unshare(towers, example=example)
    assert count_calls(apart, example)[:3] == [("", 1), ("tower", 2), ("tower.0", 1)]
    exactly(apart(**example), towers(**example))
    assert unshare(towers, example=(X, X)).state_dict().keys() == apart.state_dict().keys()


def test_counting_leaves_the_model_as_it_was() -> None:
    model = Loop()
    before, random = state(model), torch.get_rng_state()
    assert count_calls(model, X)[:3] == [("", 1), ("block", LAYERS), ("block.attention", LAYERS)]
    exactly(state(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(x._forward_pre_hooks for x in model.modules())
    assert model.training
    with pytest.raises(TypeError, match=r"example must be a tuple of the model's arguments, .* got int"):
        count_calls(model, 3)


def block_of(model: Any, kind: str) -> Any:
    """The shared one, before."""
    path = MODELS[kind][2]
    return model.get_submodule(path.replace(".{}", "") if "loop" in kind else path.format(0))


def step(model: Any, optimizer: Any = None) -> None:
    model.zero_grad()
    (output(model.eval()) * X).sum().backward()
    if optimizer:
        optimizer.step()


OPTIMIZERS: dict[str, Any] = {
    "Adam": partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "lazy": partial(optim.LazyAdam, lr=0.01),
}
MOMENTS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def trained(kind: str, make: Any) -> tuple[Any, dict[str, Any], Any]:
    model, options = built(kind)
    optimizer = make(model.parameters())
    for _ in range(2):
        step(model, optimizer)
    return model, options, optimizer


@every
def test_gradients_are_parts_of_the_shared_one(kind: str) -> None:
    model, options = built(kind)
    apart = unshare(model, **options)
    for net in (model, apart):
        step(net)
    parts = [dict(x.named_parameters()) for x in copies(apart, kind)]
    for name, p in block_of(model, kind).named_parameters():
        close(sum(part[name].grad for part in parts), p.grad)


@every
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sgd_at_n_times_the_rate_moves_the_mean_as_the_shared_weight(kind: str, momentum: float) -> None:
    """Also with momentum, if it was scaled: the copies' buffers add up to the shared one."""
    model, options, optimizer = trained(kind, partial(torch.optim.SGD, lr=0.01, momentum=momentum))
    other = copy.deepcopy(optimizer)  # drives no model
    apart = unshare(model, optimizer=optimizer, state="scale", **options)
    other.param_groups[0]["params"] = [*model.parameters()]
    other.state = {p: x for p, x in zip(model.parameters(), other.state.values(), strict=False)}  # type: ignore
    optimizer.param_groups[0]["lr"] *= LAYERS
    step(model, other)
    step(apart, optimizer)
    parts = [dict(x.named_parameters()) for x in copies(apart, kind)]
    for name, p in block_of(model, kind).named_parameters():
        close(torch.stack([part[name] for part in parts]).mean(0), p)


@every
def test_adam_moves_each_copy_as_far_as_the_shared_weight_at_first(kind: str) -> None:
    model, options = built(kind)
    apart = unshare(model, **options)
    for net in (model, apart):
        step(net, torch.optim.Adam(net.parameters(), lr=0.01, eps=1e-30))
    start = dict(block_of(built(kind)[0], kind).named_parameters())
    for block in (block_of(model, kind), *copies(apart, kind)):
        for name, p in block.named_parameters():
            close((p - start[name]).abs(), 0.01 * (p.grad != 0), rtol=1e-3, atol=1e-6)


@inside
@optimizers
@pytest.mark.parametrize(("mode", "inplace"), [("copy", False), ("scale", True), ("reset", False), ("copy", True)])
def test_the_optimizer_follows(kind: str, make: Any, mode: Any, inplace: bool) -> None:
    model, options, optimizer = trained(kind, make)
    optimizer.param_groups[0]["lr"] = 0.02
    group = optimizer.param_groups[0]
    before = {name: copy.deepcopy(optimizer.state[p]) for name, p in block_of(model, kind).named_parameters()}
    others = [copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters() if n[:4] in ("word", "head")]
    apart = unshare(model, optimizer=optimizer, state=mode, inplace=inplace, **options)
    assert (apart is model) == inplace
    assert optimizer.param_groups == [group]
    assert {*group["params"]} == {*apart.parameters()} >= {*optimizer.state}
    assert len(group["params"]) == len({*group["params"]})
    assert group["lr"] == 0.02
    exactly([optimizer.state[p] for n, p in apart.named_parameters() if n[:4] in ("word", "head")], others)
    seen = set()
    for block in copies(apart, kind):
        for name, p in block.named_parameters():
            assert p.grad is None
            if mode == "reset":
                assert p not in optimizer.state
                continue
            for key, x in optimizer.state[p].items():
                scale = LAYERS ** -MOMENTS.get(key, 0) if mode == "scale" else 1
                exactly(x, before[name][key] * scale)
                seen.add(x.data_ptr() if isinstance(x, Tensor) else id(p))
    assert mode == "reset" or len(seen) >= LAYERS * len(before)
    step(apart, optimizer)
    assert len({x.ffn.weight.sum().item() for x in copies(apart, kind)}) > 1


@optimizers
@inside
@pytest.mark.parametrize("inplace", [False, True])
def test_and_comes_back(kind: str, make: Any, inplace: bool) -> None:
    model, options, optimizer = trained(kind, make)
    before = [copy.deepcopy(optimizer.state[p]) for p in model.parameters()]
    apart = unshare(model, optimizer=optimizer, **options)
    joined = reshare(apart, optimizer=optimizer, inplace=inplace)
    assert (joined is apart) == inplace
    assert optimizer.param_groups[0]["params"] == [*joined.parameters()]
    exactly([optimizer.state[p] for p in joined.parameters()], before)
    assert len(optimizer.state) == len(before)
    step(joined, optimizer)


def test_scaled_by_the_share_of_calls() -> None:
    model, options, optimizer = trained("loop", OPTIMIZERS["Adam"])
    before = copy.deepcopy(optimizer.state[model.block.norm.bias])
    apart: Any = unshare(model, layers=[0], optimizer=optimizer, state="scale", **options)
    for call, share in ((0, 0.25), (3, 0.75)):
        found = optimizer.state[apart.block[call].norm.bias]
        exactly((found["exp_avg"], found["exp_avg_sq"]), (before["exp_avg"] * share, before["exp_avg_sq"] * share**2))
        exactly(found["step"], before["step"])


def test_groups_names_and_an_optimizer_of_few_parameters() -> None:
    model: Any = within(aliases)()
    block = model.encoder[0]
    block.ffn.bias.requires_grad_(False)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and "norm" not in n}
    few: list[Any] = [(n, p) for n, p in named.items() if n.endswith("dense.bias")]
    given: list[Any] = [{"params": [*model.head.named_parameters()]}, {"params": few, "lr": 1.0}]
    optimizer = torch.optim.SGD(given, lr=0.1)
    apart: Any = unshare(model, optimizer=optimizer)
    head, copied = optimizer.param_groups
    assert head["params"] == [apart.head.weight, apart.head.bias]
    assert copied["params"] == [x.attention.dense.bias for x in apart.encoder]
    assert copied["param_names"] == [f"encoder.{i}.attention.dense.bias" for i in range(LAYERS)]
    assert (head["lr"], copied["lr"]) == (0.1, 1.0)
    optimizer.load_state_dict(optimizer.state_dict())
    reshare(apart, optimizer=optimizer, inplace=True)
    assert optimizer.param_groups[1]["param_names"] == ["encoder.0.attention.dense.bias"]


# means and distances


def test_means_and_drift() -> None:
    """Means over calls, of buffers too; distances by hand; the same on an ALBERT without a record."""
    for kind in ("aliases", "loop", "albert"):
        model, options = built(kind)
        apart: Any = unshare(model, layers=[0], **options)
        assert all((r.copies, r.max, r.rms) == (2, 0, 0) for r in drift_report(apart).rows)
        with _expanded(apart):
            blocks = copies(apart, kind)
        with torch.no_grad():
            for i in (0, 3):
                blocks[i].norm.weight.fill_(1 + 4 * (i == 0))
                blocks[i].norm.bias.fill_(0.0)
                blocks[i].norm.running_mean.fill_(i)
                blocks[i].attention.count.fill_(i)
        if kind == "albert":
            del apart._unshared
        report = drift_report(apart)
        (row,) = [r for r in report.rows if r.parameter.endswith("norm.weight")]
        close((row.max, row.rms), (1.5, (9 / 4 + 3 / 4) ** 0.5 / 2))
        assert [r.max for r in report.rows if r.parameter.endswith("norm.bias")] == [0]
        assert all(r.max == 0 for r in report.rows if "norm" not in r.parameter)
        assert str(report).splitlines()[0].split() == ["module", "parameter", "copies", "max", "rms"]
        assert len(str(report).splitlines()) == 1 + len(report.rows)
        block = block_of(reshare(apart), kind)
        exactly(block.norm.weight, torch.full((DIM,), 2.0))
        exactly(block.norm.running_mean, torch.full((DIM,), 2.25))
        assert block.attention.count == 0


def test_a_mean_of_equal_numbers_is_exact() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        block = nn.Linear(9, 9, dtype=dtype)
        for n in (2, 3, 7):
            model = nn.Sequential(*[block] * n)
            exactly(state(reshare(unshare(model))), state(model))


def test_inside_a_bigger_model() -> None:
    """Hooks are on the model that was given: it may be a part, called twice, and re-shared from outside."""
    inner = unshare(Loop().eval(), example=X)
    outer = nn.Sequential(inner, nn.Tanh(), inner)
    exactly(outer(X), inner(inner(X).tanh()))
    assert drift_report(outer).rows[0].module == "0.block"
    joined: Any = reshare(outer)
    assert joined[0] is joined[2]
    assert isinstance(joined[0].block, Layer)
    exactly(joined(X), outer(X))


# calls


def test_calls_outside_of_a_forward_and_another_number_of_them() -> None:
    """Clear errors, after which the next forward is right."""
    model: Any = Loop().eval()
    apart: Any = unshare(model, example=X)
    wanted = model(X)
    for calls, got in ((3, "got 3 calls"), (5, "got more than 4 calls")):
        with pytest.raises(RuntimeError, match=f"depends on the data: {got}.*wanted 4"):
            apart(X, calls)
        with pytest.raises(RuntimeError, match="known only inside a forward"):
            apart.block(X)
        exactly(apart(X), wanted)
    handle = apart.block[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apart(X)
    handle.remove()
    with pytest.raises(RuntimeError, match="of 4 copies"):
        apart.block(X)
    exactly(apart(X), wanted)
    exactly(apart.block[1](X), model.block(X))
    with pytest.raises(AttributeError, match="copy for each call and no 'ffn' of its own"):
        apart.block.ffn  # noqa: B018


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # counting runs without gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    """Of the whole model it is right; of a part it is refused, for its second forward does not know which call."""
    model, x = Loop().eval(), X.clone().requires_grad_()
    apart: Any = unshare(model, example=X)
    apart(x).sum().backward()
    wanted, x.grad = x.grad, None
    checkpoint(apart, x, use_reentrant=reentrant).sum().backward()
    exactly(x.grad, wanted)

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Any:
            for _ in range(2):
                x = checkpoint(self.block, x.tanh(), use_reentrant=reentrant)  # type: ignore[assignment]
            return x

    parts = unshare(Parts(), example=X)
    with pytest.raises(RuntimeError, match="checkpoint it as a whole"):
        parts(x).sum().backward()


@inside
def test_copied_pickled_and_compiled(kind: str) -> None:
    model, options = built(kind)
    apart = unshare(model.eval(), **options)
    wanted, file = model(X), io.BytesIO()
    torch.save(apart, file)
    file.seek(0)
    for other in (copy.deepcopy(apart), pickle.loads(pickle.dumps(apart)), torch.load(file, weights_only=False)):
        exactly(other(X), wanted)
        assert other._unshared == apart._unshared
        assert not {*other.parameters()} & {*apart.parameters()}
        exactly(reshare(other)(X), wanted)
    for backend in ("eager", "aot_eager") if "loop" in kind else ("eager",):
        torch.compiler.reset()
        counter: Any = CompileCounterWithBackend(backend)
        whole = apart if backend == "eager" else nn.Sequential(apart, nn.Identity())  # hooks on the root, and inside
        fast: Any = torch.compile(whole, backend=counter, fullgraph=True)
        for _ in range(2):
            found = fast(X)
        close(found, wanted)
        assert counter.frame_count == 1
        found.sum().backward()
    torch.compiler.reset()
    exactly(apart(X), wanted)


def test_two_processes(on_two: Callable[[str], None]) -> None:
    """DDP and FSDP2 over two gloo processes are one process with the joined batch."""
    on_two("surgery_on_two.py")


# what is refused


def _optimizers(model: nn.Module) -> dict[str, Any]:
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    strange = torch.optim.Adadelta(model.parameters())
    step(model, strange)
    return {
        "wrapped": optim.Lookahead(inner),
        "lbfgs": torch.optim.LBFGS(model.parameters()),
        "other": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),
        "strange": strange,
    }


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"pattern": "blok"}, "pattern 'blok' matches no module; the nearest are block"),
    ({"pattern": ["block", "x.y"]}, "'x.y' matches no module"),
    ({"pattern": "relu"}, "nothing that 'relu' matches is called more than once in a forward of the example"),
    ({"layers": range(2), "groups": 2}, "layers and groups exclude one another"),
    ({"layers": range(5)}, "layers must be below 4, the number of calls of block, got 4"),
    ({"layers": []}, r"layers must be numbers of calls from 0, such as range\(2\), got \[\]"),
    ({"layers": [-1]}, "layers must be numbers of calls from 0"), ({"groups": 0}, "groups must be at least 1, got 0"),
    ({"groups": 5}, "groups must be at most 4, the number of calls of block, got 5"),
    ({"state": "clone"}, "state must be 'copy', 'scale' or 'reset', got 'clone'"),
    ({"optimizer": "wrapped"}, "Lookahead wraps another optimizer: give that one, Lookahead.optimizer"),
    ({"optimizer": "lbfgs"}, "LBFGS keeps one state"), ({"optimizer": None}, "must be a torch optimizer, got int"),
    ({"optimizer": "other"}, "SGD drives none of the model's parameters"),
    ({"optimizer": "strange", "state": "scale"}, "no rule for acc_delta of Adadelta: take 'copy' or 'reset'"),
    ({"example": 3}, "example must be a tuple of the model's arguments"),
    ({"example": (X, 2, 3)}, "positional argument"),
    ({"example": (X, 1)}, "no module with parameters is called more than once in a forward of the example"),
    ({"example": None}, "no module with parameters stands in several places; give example="),
]  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_refused(inplace: bool) -> None:
    """And the model and the optimizer are as they were."""
    model = Loop()
    choice = _optimizers(model)
    before, modules = state(model), [*model.named_modules()]
    for options, message in WRONG:
        given = {"example": X, "inplace": inplace, **options}
        optimizer = None
        if "optimizer" in options:
            given["optimizer"] = optimizer = choice.get(options["optimizer"], 3)
        saved = [[*g["params"]] for g in getattr(optimizer, "param_groups", [])]
        with pytest.raises((ValueError, TypeError), match=message):
            unshare(model, **given)
        exactly(state(model), before)
        assert [*model.named_modules()] == modules
        assert not any(x._forward_pre_hooks or x._forward_hooks for x in model.modules())
        assert [g["params"] for g in getattr(optimizer, "param_groups", [])] == saved
    albert: Any = Albert()
    group = albert.albert_layer_groups[0]
    with pytest.raises(ValueError, match="layers must be below 4"):
        unshare(albert, layers=[7], inplace=inplace)
    assert [*albert.albert_layer_groups] == [group]
    assert albert.config.num_hidden_groups == 1
    apart: Any = unshare(model, example=X)
    apart.block[1].ffn = nn.Linear(DIM, 7)
    with pytest.raises(ValueError, match="of other names or shapes"):
        reshare(apart, inplace=inplace)
    assert isinstance(apart.block, PerCall)
    apart.block = nn.Identity()
    with pytest.raises(ValueError, match="not where they were put"):
        drift_report(apart)


# transformers


@pytest.fixture(scope="module")
def albert(transformers: Callable[[str], Any]) -> Any:
    return transformers("transformers.models.albert")


IDS = torch.arange(12).view(2, 6)


def bert(albert: Any, kind: str = "AlbertForMaskedLM", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 16}
    config = albert.AlbertConfig(**sizes, num_attention_heads=2, num_hidden_layers=4, **options)
    return getattr(albert, kind)(config).eval()


def logits(model: Any) -> Tensor:
    return model(IDS)[0]  # type: ignore[no-any-return]


FULL: dict[str, Any] = {}
ATTENTION, FFN = {"pattern": "*.attention"}, {"pattern": "*.ffn*"}


@pytest.mark.parametrize(
    ("asked", "inner"), [(FULL, 1), (FULL, 2), ({"groups": 2}, 1), (ATTENTION, 1), (FFN, 2), ({"layers": range(2)}, 1)]
)
def test_transformers(albert: Any, asked: Any, inner: int, tmp_path: Path) -> None:
    """The library's own layout: it saves and loads without us, to the bit, and is as it was when re-shared."""
    model = bert(albert, inner_group_num=inner)
    apart: Any = unshare(model, **asked)
    encoder = apart.albert.encoder
    groups = asked.get("groups", 4)
    assert apart.config is encoder.config is apart.albert.config
    assert apart.config.num_hidden_groups == len(encoder.albert_layer_groups) == groups
    exactly(logits(apart), logits(model))
    assert apart.predictions.decoder.weight is apart.get_input_embeddings().weight
    whole = {} if {*asked} <= {"groups"} else {"state_dict": state_dict(apart, ties="copy")}
    apart.save_pretrained(tmp_path, **whole)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_groups == groups
    exactly(logits(loaded), logits(model))
    assert size(unshare(loaded)) == size(unshare(model))
    joined: Any = reshare(apart)
    assert joined.config.num_hidden_groups == 1
    exactly(state(joined), state(model))
    exactly(state(reshare(loaded)), state(model))
    joined.save_pretrained(tmp_path / "back")
    exactly(logits(type(model).from_pretrained(tmp_path / "back").eval()), logits(model))


@pytest.mark.parametrize("kind", ["AlbertModel", "AlbertForSequenceClassification", "AlbertForTokenClassification"])
def test_transformers_heads(albert: Any, kind: str) -> None:
    """In training with dropout from one seed; hidden states of every layer; and steps make layers differ."""
    model = bert(albert, kind, attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    apart = unshare(model, optimizer=optimizer)
    found, wanted = ([output(x.train(), IDS), x.eval()(IDS, output_hidden_states=True)] for x in (apart, model))
    exactly(found[0][0], wanted[0][0])
    exactly(found[1].hidden_states, wanted[1].hidden_states)
    apart.train()(IDS)[0].square().sum().backward()
    optimizer.step()
    assert min(row.max for row in drift_report(apart).rows if row.parameter.endswith("ffn.weight")) > 0
