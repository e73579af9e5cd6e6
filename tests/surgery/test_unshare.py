"""Copies instead of shared modules: the same bits, exact relations of gradients and optimizers, and the way back."""

import copy
import io
import pickle
import subprocess
import sys
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
from pyseq.surgery import drift_report, reshare, unshare
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
        self.config = types.SimpleNamespace(
            num_hidden_layers=LAYERS, num_hidden_groups=groups, inner_group_num=inner
        )
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


def within(encoder: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
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
    apart = unshare(model, **options)
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


@every
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
    from pyseq.surgery._albert import group_a_layer

    return group_a_layer(model, shorten=False)


@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_albert_keeps_its_layout(groups: int, inner: int) -> None:
    model = Within(Albert(groups, inner))
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
    assert len(reshare(apart).encoder.albert_layer_groups) == 1


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
    block = nn.Sequential(*[nn.Linear(DIM, DIM)] * 2)
    apart: Any = unshare(nn.Sequential(block, block))
    for model in (apart, unshare(apart)):
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
    with pytest.raises(TypeError, match="example must be a tuple of arguments, .* got int"):
        count_calls(model, 3)


# optimizers


def trained(kind: str, make: Any, steps: int = 2) -> tuple[Any, dict[str, Any], Any]:
    model, options = built(kind)
    optimizer = make(model.parameters())
    for _ in range(steps):
        step(model.eval(), optimizer)
    optimizer.zero_grad()
    return model, options, optimizer


def step(model: Any, optimizer: Any = None) -> None:
    model.zero_grad()
    (output(model) * X).sum().backward()
    if optimizer:
        optimizer.step()


OPTIMIZERS: dict[str, Any] = {
    "Adam": partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "lazy": partial(optim.LazyAdam, lr=0.01),
}


@every
def test_gradients_are_parts_of_the_shared_one(kind: str) -> None:
    model, options = built(kind)
    apart = unshare(model, **options)
    for net in (model, apart):
        step(net.eval())
    shared, parts = copies(reshare(unshare(model, **options)), kind)[0] if False else None, copies(apart, kind)
    del shared
    for name, p in parts[0].named_parameters():
        total = sum(dict(x.named_parameters())[name].grad for x in parts)
        (mine,) = [q for n, q in model.named_parameters() if n.endswith(name) and q.shape == p.shape][:1]
        close(total, mine.grad, rtol=1e-4, atol=1e-5)
