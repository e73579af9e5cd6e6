"""Parts of models: from any value to any other, to the bit, on graphs and on models that are none."""

import copy
import math
import pickle
import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from pyseq import surgery
from pyseq._capture import capture
from pyseq.surgery._intercept import Intercepted
from pyseq.surgery._parts import Part

Pair = namedtuple("Pair", ["left", "right"])


class Block(nn.Module):
    """Has all that spoils captures: in-place activations, a parameter used bare, functional dropout."""

    def __init__(self, dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.inner, self.norm, self.relu = nn.Conv1d(dim, dim, 3, padding=1), nn.BatchNorm1d(dim), nn.ReLU(inplace=True)
        self.scale, self.drop = nn.Parameter(torch.rand(1)), drop

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.inner(x))) * self.scale
        h = F.dropout(h, self.drop, training=self.training)
        h += x
        return self.relu(h)  # type: ignore[no-any-return]


class Residual(nn.Module):
    offset: Tensor

    def __init__(self, drop: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 4, 3)
        self.layers = nn.Sequential(Block(4, drop), Block(4, drop))
        self.block = Block(4, drop)
        self.head, self.unused = nn.Linear(4, 2), nn.Linear(7, 7)
        self.register_buffer("offset", torch.randn(50), persistent=False)

    def forward(self, x: Tensor, times: int = 2) -> dict[str, Tensor]:
        h = self.layers(self.stem(x))
        for _ in range(times):
            h = self.block(h)
        batch, channels, length = h.shape
        pooled = h.reshape(batch, channels, -1).mean(-1) + self.offset[:channels] + torch.arange(channels) / length**0.5
        return {"scores": self.head(pooled), "pooled": F.relu(pooled)}


def state(model: nn.Module) -> list[Tensor]:
    return [x.clone() for x in (*model.parameters(), *model.buffers())]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b)


def run(model: Callable[..., Any], *args: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return model(*args)


@torch.no_grad()
def through(model: nn.Module, head: nn.Module, tail: nn.Module, x: Any) -> bool:
    """Head and tail give what the model gives, leave its buffers as it would, and change no value between."""
    twin = copy.deepcopy((model, head, tail))  # all three share what they share
    expected = run(model, x)
    torch.manual_seed(0)
    values = twin[1](x)
    kept = copy.deepcopy(values)
    found = twin[2](values)
    return same(found, expected) and same(values, kept) and all(map(torch.equal, state(model), state(twin[0])))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_cut_of_a_residual_network(training: bool) -> None:
    """Each address either cuts to the bit or says what leaks; cut there as well, it is right."""
    torch.manual_seed(0)
    model, x = Residual().train(training), torch.randn(2, 3, 9)
    before = state(model)
    cuts = []
    for place in surgery.nodes(model, x)[1:]:
        head = surgery.submodel(model, place.address, example=x)
        try:
            tail = surgery.submodel(model, inputs=place.address, example=(x,))
        except ValueError as error:
            message = str(error)
            assert "leaks: " in message or "does not come after" in message
            if ", a size" in message or "add " not in message:
                continue
            more = [place.address, *message.rpartition("; add ")[2].removesuffix(" to inputs").split(", ")]
            values = surgery.submodel(model, more, example=x).eval()(x)
            both = surgery.submodel(model, inputs=more, example=x).eval()
            assert same(both(*values), copy.deepcopy(model).eval()(x))
            model.train(training)
            continue
        cuts.append(place.address)
        for size in (2, 5):
            assert through(model, head, tail, torch.randn(size, 3, 6 + size)), place.address
    assert {"layers.0", "layers.1", "layers.0.add", "block#0", "block#1", "block.add#0", "block.add#1"} <= {*cuts}
    assert training or all(map(torch.equal, state(model), before))


def test_capture_leaves_the_model_as_it_was() -> None:
    model, x = Residual(), torch.randn(2, 3, 9)
    model.get_submodule("layers.1").eval()
    model.stem.register_forward_hook(lambda *_: None)
    modes = [m.training for m in model.modules()]
    names = {id(m): set(vars(m)) for m in model.modules()}
    hooks = [[*m._forward_hooks.values()] for m in model.modules()]
    before, random_state, version = state(model), torch.get_rng_state(), x._version
    surgery.nodes(model, x)
    surgery.submodel(model, "block#1", example=x)
    for bad in ("nothing", "block"):
        with pytest.raises(ValueError, match="block"):
            surgery.submodel(model, "nothing.block" if bad == "nothing" else bad, example=x)
    assert all(map(torch.equal, state(model), before))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (modes, version) == ([m.training for m in model.modules()], x._version)
    assert names == {id(m): set(vars(m)) for m in model.modules()}
    assert hooks == [[*m._forward_hooks.values()] for m in model.modules()]
    assert nn.Module.__call__.__qualname__.startswith("Module.")


def test_a_part_shares_and_counts_only_what_it_uses() -> None:
    model, x = Residual(), torch.randn(2, 3, 9)
    tail = surgery.submodel(model, inputs="layers.0", example=x)
    assert isinstance(tail, Part)
    own = dict(model.named_parameters())
    assert all(own[name] is p for name, p in tail.named_parameters())
    assert {n.partition(".")[0] for n in own} - {n.partition(".")[0] for n, _ in tail.named_parameters()} == {
        "stem", "unused"
    }  # fmt: skip
    assert not any(n.startswith("layers.0") for n, _ in tail.named_parameters())
    assert set(tail.state_dict()) <= set(model.state_dict())
    assert tail.offset is model.offset  # which is in neither
    middle = surgery.submodel(model, ["block#0", "layers.1.add"], "layers.0", example=x)
    values = surgery.submodel(model, ["layers.0", "block#0", "layers.1.add"], example=x).eval()(x)
    assert same(middle.eval()(values[0]), values[1:])
    # gradients are the model's
    model.eval()
    model(x)["scores"].sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    head = surgery.submodel(model, "layers.0", example=x)
    tail.eval()(head(x))["scores"].sum().backward()
    assert all(torch.equal(g, own[n].grad) for n, g in expected.items() if own[n].grad is not None)  # type: ignore[arg-type]


def test_modes() -> None:
    """Functional dropout follows the part's mode, as do its modules."""
    model, x = Residual(0.5), torch.randn(4, 3, 9)
    part = surgery.submodel(model, "layers", example=x)
    assert not torch.equal(run(part, x, seed=1), run(part, x, seed=2))
    part.eval()
    assert torch.equal(run(part, x, seed=1), run(part, x, seed=2))
    part.train()
    assert "getattr(self.layers, '0').training" in str(part.code)
    first = part.get_submodule("layers.0").eval()
    second = part.get_submodule("layers.1").eval()
    assert part.training
    assert torch.equal(run(part, x, seed=1), run(part, x, seed=2))
    first.train()
    assert not second.training
    assert not torch.equal(run(part, x, seed=1), run(part, x, seed=2))

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x + torch.rand_like(x) if self.training else x * 2

    branch = Branch()
    x = torch.randn(2, 3)
    tail = surgery.submodel(branch, inputs="a", example=x)
    assert torch.equal(run(tail, branch.a(x)), run(branch, x))
    assert torch.equal(tail.eval()(branch.a(x)), branch.eval()(x))


class Data(nn.Module):
    """Goes one way or another by its values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.left, self.right, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.norm(self.first(x)), 0.2, self.training)
        h = self.left(h) if h.sum() > 0 else self.right(h)
        return self.last(F.dropout(h + 1, 0.2, self.training))  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("at", ["first", "norm", "dropout"])
def test_control_flow(at: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = Data().train(training), torch.randn(3, 4)
    before = state(model)
    head, tail = surgery.submodel(model, at, example=x), surgery.submodel(model, inputs=at, example=x)
    assert isinstance(head, Intercepted)
    assert isinstance(tail, Intercepted)
    assert all(map(torch.equal, state(model), before))
    ways = set()
    for seed in range(8):
        x = 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        assert through(model, head, tail, x)
        ways.add(bool(surgery.submodel(model, "dropout", example=x).eval()(x).sum() > 0))
    assert ways == {True, False}
    assert not any(n.startswith("first") for n, _ in tail.named_parameters())
    assert {n for n, _ in head.named_parameters() if n.startswith("last")} == set()
    tail.eval()
    assert not model.training
    twin = pickle.loads(pickle.dumps(tail))
    value = head(x)
    assert torch.equal(twin(value), tail(value))


def test_control_flow_that_a_tail_cannot_follow() -> None:
    model, x = Data(), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"reads values of 'gt' at test_submodel\.py:\d+"):
        surgery.submodel(model, inputs="add", example=x)
    assert torch.equal(
        surgery.submodel(model, "add", example=x).eval()(x) @ model.last.weight.T + model.last.bias, model(x)
    )

    class Skip(Data):
        def forward(self, x: Tensor) -> Any:
            h = self.first(x)
            g = self.left(h) if x.sum() > 1e9 else self.right(h)
            return g + h

    with pytest.raises(ValueError, match="reads values of 'gt' at"):
        surgery.submodel(Skip(), inputs="right", example=x)

    class Leak(Data):
        def forward(self, x: Tensor) -> Any:
            h = self.first(x)
            g = self.right(h)
            return (self.left(g) if g.sum() > 0 else g) + h

    with pytest.raises(ValueError, match="'first' is wanted by 'add'"):
        surgery.submodel(Leak(), inputs="right", example=x)
    both = surgery.submodel(leak := Leak(), inputs=["right", "first"], example=x)
    h = leak.first(x)
    assert torch.equal(both(leak.right(h), h), leak(x))


class Inner(nn.Module):
    """A module with control flow inside a model that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.a(x) if x.sum() > 0 else -self.a(x)


def test_a_module_with_control_flow_is_one_value() -> None:
    inner, x = Inner(), torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), inner, nn.ReLU(), nn.Linear(4, 2))
    part = surgery.submodel(model, inputs="0", example=x)
    assert isinstance(part, Part)
    for seed in range(6):
        x = run(torch.randn, 3, 4, seed=seed)
        assert torch.equal(part(model[0](x)), model(x))
    inside = surgery.submodel(model, "1.a", example=x)
    assert isinstance(inside, Intercepted)
    assert torch.equal(inside(x), inner.a(model[0](x)))


def test_rerun() -> None:
    model, x = Residual().eval(), torch.randn(2, 3, 9)
    edited = torch.randn(2, 4, 7, requires_grad=True)
    tail = surgery.submodel(model, inputs="layers.1", example=x)
    out = surgery.rerun(model, x, {"layers.1": edited})
    assert same(out, tail(edited))
    out["scores"].sum().backward()
    assert edited.grad is not None
    both = surgery.rerun(model, {"x": x}, {"layers.0.inner": edited.detach(), "block#1": 2 * edited.detach()})
    assert same(both, surgery.submodel(model, inputs="block#1", example=x)(2 * edited.detach()))
    inner = surgery.rerun(model, (x, 2), {"layers.0.inner": torch.zeros(2, 4, 7)})
    assert not same(inner, model(x))
    data = Data().eval()
    assert torch.equal(surgery.rerun(data, (x[0, :, :4],), {"add": torch.zeros(3, 4)}), data.last.bias.expand(3, 2))
    for bad, message in (
        ({}, "at least one"),
        ({"block": edited}, "2 times"),
        ({"blok#1": edited}, "nearest: block#1"),
    ):
        with pytest.raises(ValueError, match=message):
            surgery.rerun(model, x, bad)
    with pytest.raises(ValueError, match="nearest: first"):
        surgery.rerun(data, x[0, :, :4], {"frist": x})


def test_structures() -> None:
    """Tuples, dicts and several inputs, at addresses and as the model's own."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, pair: Pair, *, scale: Tensor | None = None, how: str = "last") -> tuple[Any, ...]:
            y, (h, c) = self.rnn(pair.left)
            left, right = torch.chunk(y, 2, dim=1)
            y = torch.cat([right, left * pair.right], 1)
            return self.out(y if scale is None else y * scale), {"h": h, how: [c]}

    model = Several()
    example: dict[str, Any] = {"pair": Pair(torch.randn(2, 6, 3), torch.tensor(3.0)), "scale": torch.tensor(2.0)}
    places = surgery.nodes(model, example["pair"], scale=example["scale"])
    assert [str(p) for p in places if p.address == "rnn"] == ["float32 (2, 6, 4), float32 (1, 2, 4), float32 (1, 2, 4)"]
    whole = surgery.submodel(model, example=example)
    other: dict[str, Any] = {"pair": Pair(torch.randn(4, 8, 3), torch.tensor(1.0)), "scale": torch.tensor(-1.0)}
    assert same(whole(**other), model(**other))
    rnn = surgery.submodel(model, "rnn", example=example)
    assert same(rnn(**other), model.rnn(other["pair"].left))
    tail = surgery.submodel(model, inputs=["rnn", "pair", "scale"], example=example)
    assert same(tail(rnn(**other), other["pair"], other["scale"]), model(**other))
    chunk = surgery.submodel(model, "chunk", "rnn", example=example)
    assert same(chunk(rnn(**other)), torch.chunk(model.rnn(other["pair"].left)[0], 2, 1))
    with pytest.raises(ValueError, match="'pair' is wanted by 'mul'"):
        surgery.submodel(model, inputs=["rnn", "scale"], example=example)
    with pytest.raises(ValueError, match="how must be as in the example, 'last', got 'first'"):
        surgery.submodel(model, example=example | {"how": "last"})(**other, how="first")


class Doubled(torch.autograd.Function):
    """Whose backward is not its forward's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 7 * grads[0]


@dataclass
class Output:
    first: Tensor
    rest: tuple[Tensor, ...] | None = None


class Scores(nn.Module):
    """Numbers and tensors in every order, reshaping by sizes, a dataclass handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Output:
        h = self.a(x)
        h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
        h = torch.reshape(Doubled.apply(h), (h.size(0), 2, h.size(-1) // 2))
        return Output(self.b(2 ** (1 - h) / h.shape[1]), (h, x))


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Scores(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Output:
        out = self.inner(x)
        return Output(self.last(out.first) + x.mean(), out.rest)


def test_functions_of_torch_and_of_users() -> None:
    model, x = Wrapper(), torch.randn(3, 4)
    at = "inner.mul_3"
    head = surgery.submodel(model, at, example=x)
    tail = surgery.submodel(model, inputs=[at, "x"], example=x)
    assert isinstance(tail, Part)
    other = torch.randn(5, 4)
    value = head(other)
    found, wanted = tail(value, other), model(other)
    assert isinstance(found, Output)
    assert found.rest is not None
    assert same((found.first, *found.rest), (wanted.first, *wanted.rest))
    (mine,) = torch.autograd.grad(found.first.sum(), [model.inner.a.weight], retain_graph=True)
    (theirs,) = torch.autograd.grad(wanted.first.sum(), [model.inner.a.weight])
    assert torch.equal(mine, theirs)  # with the user's backward
    twin = pickle.loads(pickle.dumps(tail))
    assert torch.equal(twin(value, other).first, found.first)
    inner = surgery.submodel(model, "inner", example=x)
    assert torch.equal(inner(other).first, model.inner(other).first)


class Aliased(nn.Module):
    """Two names for one value, a module that hands its input on, an activation in place whose input is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.same = nn.Linear(4, 4), nn.BatchNorm1d(4), Same()

    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.a(x))
        other = h
        h += 1
        y = F.relu(other * 1, inplace=True)
        z = self.a(y)
        F.relu(z, inplace=True)
        return self.same(other) * 2 + z + other


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_aliases() -> None:
    model, x = Aliased(), torch.randn(1, 4)  # one row, on which batch norm could not be trained
    assert isinstance(surgery.submodel(model, example=x), Part)
    model.eval()
    whole = surgery.submodel(model, example=x)
    x = torch.randn(3, 4)
    assert torch.equal(whole(x), model(x))
    h = surgery.submodel(model, "add", example=x)(x)
    assert torch.equal(h, model.norm(model.a(x)) + 1)
    assert torch.equal(surgery.rerun(model, x, {"same": torch.zeros(3, 4)}), F.relu(model.a(F.relu(h))) + h)
    z = surgery.submodel(model, "relu_1", example=x)(x)
    assert torch.equal(surgery.submodel(model, inputs=["relu_1", "add"], example=x)(z, h), model(x))


class Late(nn.Module):
    """Writes into its output by a view, after all that hangs on it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        first = h[:, :1]
        first += 1
        return h


def test_values_are_as_when_they_were_made_and_outputs_as_in_the_end() -> None:
    late, x = Late(), torch.randn(2, 4)
    assert torch.equal(surgery.submodel(late, example=x)(x), late(x))
    assert torch.equal(surgery.submodel(late, "a", example=x)(x), late.a(x))
    model, x = Residual().eval(), torch.randn(2, 3, 9)
    alone = surgery.submodel(model, "layers.0.norm", example=x)(x)
    beside, _ = surgery.submodel(model, ["layers.0.norm", "layers.0"], example=x)(x)  # an activation writes into it
    assert alone.min() < 0
    assert torch.equal(beside, alone)


def test_shared_modules_and_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.mix = parametrizations.weight_norm(nn.Linear(4, 4))
            self.bias = nn.Parameter(torch.randn(9))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.mix(self.mix(self.embed(x))), self.embed.weight, self.bias)

    model, x = Tied(), torch.randint(0, 9, (2, 5))
    assert [p.address for p in surgery.nodes(model, x)] == ["x", "embed", "mix#0", "mix#1", "linear"]
    tail = surgery.submodel(model, inputs="mix#0", example=x)
    assert torch.equal(tail(model.mix(model.embed(x))), model(x))
    assert tail.get_parameter("embed.weight") is model.embed.weight
    with pytest.raises(ValueError, match=r"'mix' is computed 2 times, name one: mix#0, mix#1"):
        surgery.submodel(model, "mix", example=x)
    with pytest.raises(ValueError, match="calls count from 0"):
        surgery.submodel(model, "mix#2", example=x)


def test_torchs_own_modules_open_on_demand() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model, x = (
        nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)),
        torch.randn(2, 5, 8),
    )
    assert [p.address for p in surgery.nodes(model, x)] == ["input", "0", "1"]
    at = "1.layers.0"
    head, tail = surgery.submodel(model, at, example=x), surgery.submodel(model, inputs=at, example=x)
    assert through(model, head, tail, torch.randn(3, 4, 8))


def test_sizes_that_code_goes_by() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell = nn.Linear(3, 4), nn.GRUCell(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h, state = self.embed(x), torch.zeros(x.size(0), 4)
            for t in range(x.size(1)):
                state = self.cell(h[:, t], state)
            return state

    model, x = Loop(), torch.randn(2, 3, 3)
    part = surgery.submodel(model, inputs=["embed", "x"], example=x)
    assert torch.equal(part(model.embed(x), x), model(x))
    with pytest.raises(ValueError, match=r"reads a size of 'x' at test_submodel\.py:\d+, and the part cannot: add"):
        surgery.submodel(model, inputs=["embed", "zeros"], example=x)
    longer = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"reads of a size must be as in the example, 3, got 4"):
        part(model.embed(longer), longer)
    with pytest.raises(ValueError, match="leaks: 'zeros' is wanted by 'cell'; add zeros"):
        surgery.submodel(model, inputs="embed", example=x)


def test_copies() -> None:
    model, x = Residual().eval(), torch.randn(2, 3, 9)
    tail = surgery.submodel(model, inputs="layers.0", example=x)
    value = surgery.submodel(model, "layers.0", example=x)(x).detach()
    for twin in (
        copy.deepcopy(tail),
        pickle.loads(pickle.dumps(tail)),
        torch.compile(tail, backend="eager", fullgraph=True),
    ):
        assert same(twin(value), model(x))
    assert copy.deepcopy(tail).get_parameter("head.weight") is not model.head.weight
    assert "inputs: layers.0; outputs: the model's own" in repr(tail)
    nested = surgery.submodel(tail, "block.norm#1", "layers.1.relu#1", example=value)
    direct = surgery.submodel(model, "block.norm#1", "layers.1", example=x)
    assert torch.equal(nested(value), direct(value))


class Random(nn.Module):
    """A random graph: each step takes one or two earlier values, sometimes in place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.maps = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.steps = [(draw.randrange(6), draw.random(), draw.random()) for _ in range(8)]

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for kind, a, b in self.steps:
            one, two = made[int(a * len(made))], made[int(b * len(made))]
            if kind < 3:
                made.append(self.maps[kind](one))
            elif kind == 3:
                made.append(one + two)
            elif kind == 4 and one is not x:
                made.append(one.mul_(2) if a < 0.5 else F.relu(one, inplace=True))
            else:
                new = two * 1
                new[:, :1] += one[:, 1:2]
                made.append(new)
        return torch.stack(made[-3:]).sum(0)


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs(seed: int) -> None:
    """Every cut is exact, or refused; never a wrong value."""
    torch.manual_seed(seed)
    model, x = Random(seed), torch.randn(2, 3)
    with torch.no_grad():
        expected, exact = model(x.clone()), 0
        for place in surgery.nodes(model, x)[1:]:
            head = surgery.submodel(model, place.address, example=x)
            try:
                tail = surgery.submodel(model, inputs=place.address, example=x)
            except ValueError:
                continue
            exact += 1
            assert torch.equal(tail(head(x)), expected), (place.address, tail.code)
    assert exact


def test_bad_input() -> None:
    model, x = Residual(), torch.randn(2, 3, 9)
    with pytest.raises(TypeError, match="example must be a tuple"):
        surgery.submodel(model, "stem", example=[x])
    with pytest.raises(TypeError, match=r"does not fit Residual\.forward"):
        surgery.submodel(model, "stem", example=(x, 2, 3))
    with pytest.raises(ValueError, match=r"no value at 'layer\.1'; nearest: layers\.1"):
        surgery.submodel(model, "layer.1", example=x)
    with pytest.raises(ValueError, match="twice"):
        surgery.submodel(model, ["stem", "stem"], example=x)
    with pytest.raises(ValueError, match="an address or a list"):
        surgery.submodel(model, [], example=x)
    with pytest.raises(ValueError, match=r"do not hang on 'layers\.0'"):
        surgery.submodel(model, "block#0", ["layers.0", "layers.1"], example=x)
    with pytest.raises(ValueError, match=r"'stem' does not come after 'layers\.0'"):
        surgery.submodel(model, "stem", "layers.0", example=x)
    with pytest.raises(RuntimeError, match="channels"):
        surgery.nodes(model, torch.randn(2, 5, 9))


def test_the_two_graphs_are_one_where_flags_alone_differ() -> None:
    graphs = capture(Residual(), torch.randn(2, 3, 9))
    assert graphs[True] is graphs[False]


# what the model's code does beside computing


class Aside(nn.Module):
    """Keeps a loss on the side, as mixtures of experts do, and what its hook saw."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.calls = nn.ModuleDict({"l": nn.Linear(4, 4), "own": KeepsOne()}), nn.Linear(4, 4), 0
        self.notes: list[Tensor] = []
        self.sizes = {"batch": 0}
        self.inner["l"].register_forward_hook(lambda _module, _args, output: self.notes.append(output))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.sizes["batch"] = int(x.shape[0])
        self.notes.clear()
        h = self.inner["own"](self.inner["l"](x))
        return self.out(h), self.inner["own"].aside, tuple(self.notes)


class KeepsOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.aside: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.aside = (x * self.weight).square().mean()
        return x * self.weight


def test_tensors_kept_aside() -> None:
    """They are those of the run, with gradients, never the example's; the model's attributes stay as they were."""
    model, x, y = Aside(), torch.randn(3, 4), torch.randn(5, 4)
    before = {name: {**vars(module)} for name, module in model.named_modules()}
    surgery.nodes(model, x)
    part: Any = surgery.submodel(model, example=x)
    assert {name: {**vars(module)} for name, module in model.named_modules()} == before
    assert (model.calls, model.notes, model.sizes) == (0, [], {"batch": 0})
    for found, wanted in zip((*part(y)[:2], *part(y)[2]), (*model(y)[:2], *model(y)[2]), strict=True):
        assert torch.equal(found, wanted)
    part(y)[1].backward()
    assert model.get_parameter("inner.own.weight").grad is not None
    edited, weight = surgery.rerun(model, x, {"inner.l": y[:3]}), model.get_parameter("inner.own.weight")
    assert torch.equal(edited[1], (y[:3] * weight).square().mean())
    assert type(surgery.submodel(model, "out", example=x)).__name__ == "Part"


class Contexts(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.frozen, self.low, self.head, self.on = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), on

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            x = self.low(x.float())
        return self.head(x.float())  # type: ignore[no-any-return]


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("ambient", [True, False])
def test_contexts_of_the_models_code(on: bool, ambient: bool) -> None:
    """no_grad and autocast blocks act in parts as in the model, whatever surrounds both."""
    model, x = Contexts(on), torch.randn(3, 4)
    part: Any = surgery.submodel(model, example=x)
    low, tail = surgery.submodel(model, "low", example=x), surgery.submodel(model, inputs="low", example=x)
    assert low(x).dtype is (torch.bfloat16 if on else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        assert torch.equal(part(x), model(x))
        assert torch.equal(tail(low(x)), model(x))
    part(x).sum().backward()
    assert model.frozen.weight.grad is None
    assert model.low.weight.grad is not None
    torch.compiler.reset()
    assert torch.equal(torch.compile(part, backend="aot_eager", fullgraph=True)(x), model(x))


def test_inference_and_seeds_are_left_to_the_model() -> None:
    class Inferred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                return super().forward(x)

    class Seeded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            torch.manual_seed(0)
            return super().forward(x) + torch.rand(4)

    for kind, reason in ((Inferred, "inference mode"), (Seeded, "random numbers are seeded")):
        inner, x = kind(4, 4), torch.randn(3, 4)
        part: Any = surgery.submodel(nn.Sequential(inner), "0", example=x)
        assert torch.equal(part(x), inner(x))
        with torch.inference_mode():
            surgery.nodes(inner, torch.randn(3, 4))
        alone = surgery.submodel(inner, example=x)
        assert reason in str(alone)
        assert torch.equal(alone(x), inner(x))


def test_packed_sequences() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.out = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            states, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
            return self.out(states)  # type: ignore[no-any-return]

    model, example = Packed(), (torch.randn(2, 5, 4), torch.tensor([3, 5]))
    other = torch.randn(3, 7, 4), torch.tensor([3, 7, 2])
    assert torch.equal(surgery.submodel(model, example=example)(*other), model(*other))
    head, tail = surgery.submodel(model, "gru", example=example), surgery.submodel(model, inputs="out", example=example)
    states, _ = nn.utils.rnn.pad_packed_sequence(head(*other)[0], batch_first=True)
    assert torch.equal(tail(model.out(states)), model(*other))


def test_a_function_called_as_a_module() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.inner = nn.ReLU(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.inner(self.relu(x)))

    model, x = Both(), torch.randn(3, 4)
    assert [place.address for place in surgery.nodes(model, x)] == ["x", "relu", "inner", "relu_1"]
    assert torch.equal(surgery.submodel(model, "relu_1", example=x)(x), model(x))


def test_a_model_that_never_ran() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0\.weight has no shape before the model's first run"):
        surgery.nodes(model, torch.randn(2, 4))
    assert type(model[0]) is nn.LazyLinear


class Steered(nn.Module):
    """A size read before a cut: how says where it acts."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        many = x.shape[0] > 1
        if self.how == "checked" and x.shape[0] > 9:
            raise ValueError("too many")
        h = self.a(x)
        if self.how == "before" and many:
            h = h * 2
        later = bool(many) if self.how == "later" else False
        if self.how == "around" and h.shape[0] > 1:
            return self.c(self.b(h))  # type: ignore[no-any-return]
        h = self.b(h)
        if self.how == "values" and h.sum() > 1e9:
            h = h * 2
        if later:
            h = self.c(h)
        return h / x.shape[0] if self.how == "values" else h  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["checked", "before"])
def test_sizes_that_steer_only_what_comes_before_a_cut(how: str) -> None:
    model, y, at = Steered(how), torch.randn(1, 4), "a" if how == "checked" else "b"
    head = surgery.submodel(model, at, example=y)
    tail = surgery.submodel(model, inputs=at, example=torch.randn(3, 4))
    assert torch.equal(tail(head(y)), model(y))


@pytest.mark.parametrize("how", ["later", "around"])
def test_sizes_that_steer_what_comes_after_a_cut(how: str) -> None:
    with pytest.raises(ValueError, match=r"reads a size of '[ax]' at test_submodel\.py:\d+, and the part cannot: add"):
        surgery.submodel(Steered(how), inputs="b", example=torch.randn(3, 4))


def test_sizes_of_the_example_in_a_model_that_is_no_graph() -> None:
    """A part that runs code before the cut on the example refuses other sizes where that code reads them."""
    model, x = Steered("values"), torch.randn(3, 4)
    tail = surgery.submodel(model, inputs="b", example=x)
    assert isinstance(tail, Intercepted)
    assert torch.equal(tail(model.b(model.a(x))), model(x))
    with pytest.raises(ValueError, match=r"a size of an input at test_submodel\.py:\d+.*example's sizes, \(3, 4\)"):
        tail(torch.randn(5, 4))


def test_two_inputs_of_which_one_is_the_models_own() -> None:
    """An encoder before a decoder: what the encoder does with sizes is no business of the decoder's."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.last = Steered("before"), nn.Linear(4, 4), Steered("before")

        def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
            seen = self.encoder(source)
            return {"y": self.last(self.decoder(target + seen.mean(0))), "seen": seen}

    model, x, y = Two(), torch.randn(3, 4), torch.randn(2, 4)
    tail = surgery.submodel(model, inputs=["encoder", "target"], example=(x, y))
    for source in (x, x[:1]):
        assert torch.equal(tail(model.encoder(source), y)["y"], model(source, y)["y"])
    with pytest.raises(ValueError, match=r"leaks: encoder\.b is part of the result; add encoder\.b to inputs"):
        surgery.submodel(model, inputs="decoder", example=(x, y))


@pytest.mark.parametrize("how", ["before", "values"])
def test_rerun_with_another_input(how: str) -> None:
    model, x, y = Steered(how), torch.randn(3, 4), torch.randn(2, 4)
    assert torch.equal(surgery.rerun(model, x, {"x": y}), model(y))
    edited = surgery.rerun(model, {"x": x}, {"x": y, "b": torch.ones(2, 4)})
    assert torch.equal(edited, torch.ones(2, 4) / (2 if how == "values" else 1))


def test_arguments_that_the_example_left_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, pad: Tensor | None = None, scale: float = 2.0) -> Tensor:
            return self.inner(x if pad is None else x + pad) * scale  # type: ignore[no-any-return]

    model, x = Model(), torch.randn(3, 4)
    part = surgery.submodel(model, example=x)
    assert torch.equal(part(x, pad=None, scale=2.0), model(x))
    for other in ({"pad": x}, {"scale": 3.0}):
        with pytest.raises(ValueError, match="must be as in the example"):
            part(x, **other)


def test_of_a_compiled_model_parts_are_those_of_the_original() -> None:
    model, x = Residual(0.0).eval(), torch.randn(2, 3, 9)
    compiled: Any = torch.compile(model, backend="eager")
    assert str(surgery.nodes(compiled, x)) == str(surgery.nodes(model, x))
    assert torch.equal(surgery.submodel(compiled, "stem", example=x)(x), model.stem(x))
    assert surgery.rerun(compiled, x, {"stem": torch.zeros(2, 4, 7)})["scores"].shape == (2, 2)


def test_rerun_in_the_present_mode() -> None:
    class Modes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x) * 2 if self.training else torch.sigmoid(x)

    model, x = Modes(), torch.ones(3)
    assert torch.equal(surgery.rerun(model, x, {"tanh": x}), 2 * x)
    assert torch.equal(surgery.rerun(model.eval(), x, {"sigmoid": x}), x)


def test_wrong_types() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    wrong: Any
    for wrong in (3, 0, [], [1]):
        with pytest.raises(ValueError, match="outputs must be an address or a list of addresses, got"):
            surgery.submodel(model, wrong, example=x)
    for wrong in ([("0", x)], {0: x}):
        with pytest.raises(TypeError, match="edits must be a dict of new values by address, got"):
            surgery.rerun(model, x, wrong)
    with pytest.raises(ValueError, match=r"'0#': '0' is computed 1 times, calls count from 0"):
        surgery.submodel(model, "0#", example=x)
    for call in (surgery.submodel, surgery.unshare):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
            call(lambda x: x, example=x)  # type: ignore[arg-type]
    for wrong, said in (({"pattern": 3}, "pattern must be"), ({"pattern": [1]}, "pattern must be"),
                        ({"layers": 2}, "layers must be numbers of calls")):  # fmt: skip
        with pytest.raises(TypeError, match=said):
            surgery.unshare(model, **wrong)
    for wrong, said in (({"pattern": []}, "pattern is an empty list"), ({"groups": "2"}, "groups must be at least 1")):
        with pytest.raises(ValueError, match=said):
            surgery.unshare(model, **wrong)
    wrong = None
    with pytest.raises(TypeError, match="a and b must be modules, got NoneType"):
        surgery.share(model, wrong)
    with pytest.raises(TypeError, match="state must be a state dict, got NoneType"):
        surgery.load_state_dict(model, wrong)


class Cache:
    """Holds tensors of a run, as the key-value caches of decoders do."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
        cache = Cache()
        h = self.inner(x)
        cache.keys.append(h)
        return self.out(h), cache


def test_objects_that_hold_tensors_of_the_run() -> None:
    """They are made anew; parts that do not give them are graphs."""
    model, x, y = Cached(), torch.randn(3, 4), torch.randn(5, 4)
    found, cache = surgery.submodel(model, example=x)(y)
    assert torch.equal(found, model(y)[0])
    assert torch.equal(cache.keys[0], model.inner(y))
    part = surgery.submodel(model, "out", example=x)
    assert type(part) is Part
    assert torch.equal(part(y), model(y)[0])


def test_what_hooks_note_down_is_a_value_of_the_graph() -> None:
    notes: list[Tensor] = []

    class Noted(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            notes.clear()
            super().forward(x)
            return tuple(notes)

    model, x, y = Noted(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4), torch.randn(5, 4)
    for layer in model:
        layer.register_forward_hook(lambda _module, _args, output: notes.append(output))
    part = surgery.submodel(model, example=x)
    assert type(part) is Part
    for found, wanted in zip(part(y), model(y), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(surgery.rerun(model, x, {"0": y[:3]})[0], y[:3])
