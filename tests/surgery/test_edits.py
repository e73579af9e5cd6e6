"""Copies, replacements, insertions and removals: what they do, what they refuse, and that undoing leaves no trace."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close as close

from pyseq.nn import TiedLinear
from pyseq.surgery import Edit, clone, insert_after, remove, replace, share, sharing_report

ROOM = "surgery"
X = torch.linspace(-1, 1, 12).view(3, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.relu = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.relu(self.norm(self.linear(x))))  # type: ignore[no-any-return]


class Net(nn.Module):
    """One block twice, one once, a chain and a head."""

    def __init__(self) -> None:
        super().__init__()
        block = Block()
        self.blocks: Any = nn.ModuleList([block, block, Block()])
        self.chain: Any = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
        self.head: Any = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.chain(x))  # type: ignore[no-any-return]


class Counter(nn.Module):
    """A buffer that is another one after each call."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x


class Words(nn.Module):
    """An embedding with a tied and a borrowing head."""

    def __init__(self) -> None:
        super().__init__()
        self.words: Any = nn.Embedding(5, 4, max_norm=0.1)
        self.first: Any = nn.Linear(4, 5)
        self.first.weight = self.words.weight
        self.second = TiedLinear(self.words)

    def forward(self, ids: Tensor) -> Any:
        x = self.words(ids)
        return {"first": self.first(x), "second": self.second(x)}


def built(train: bool = True) -> Any:
    torch.manual_seed(0)
    net = Net().train(train)
    net.blocks[2].norm.eval()
    net.chain.register_forward_hook(lambda module, args, output: output + 1)
    return net


def trace(model: nn.Module) -> list[Any]:
    """All that an undone edit must restore: modules, names, order, tensors and their values, modes and hooks."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [*module._forward_hooks.items(), *module._forward_pre_hooks.items()]
        found.append((name, id(module), module.training, [*module._modules], hooks, sorted(vars(module))))
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [*found, *((name, id(t), t.requires_grad, t.tolist()) for name, t in tensors)]


EDITS: dict[str, Callable[[Any], Edit]] = {
    "replace": lambda m: replace(m, "chain.1", nn.GELU(), example=X),
    "replace all": lambda m: replace(m, "*.relu", lambda old: nn.PReLU(), example=(X,)),
    "wrap": lambda m: replace(m, "blocks.?", lambda old: nn.Sequential(old, nn.Tanh()), example={"x": X}),
    "head": lambda m: replace(m, "head", nn.Linear(4, 7), example=X),
    "insert": lambda m: insert_after(m, "head", nn.Linear(2, 2), example=X),
    "insert all": lambda m: insert_after(m, "*.linear", lambda old: nn.LayerNorm(4), example=X),
    "append": lambda m: insert_after(m, "chain", nn.Linear(4, 4), example=X),
    "remove": lambda m: remove(m, "*.drop", example=X),
    "remove more": lambda m: remove(m, "chain", keep_shape=False),
    "share": lambda m: share(m.blocks[0], m.blocks[2]),
}
every = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)


@every
@pytest.mark.parametrize("train", [True, False])
def test_undo_leaves_no_trace(edit: Callable[[Any], Edit], train: bool) -> None:
    model = built(train)
    before, state = trace(model), torch.get_rng_state()
    done = edit(model)
    changed = trace(model)
    assert changed != before
    again = copy.deepcopy((model, done))
    done.undo()
    assert trace(model) == before
    again[1].undo()
    assert [x[0] for x in trace(again[0])] == [x[0] for x in before]
    with pytest.raises(RuntimeError, match="undone already"):
        done.undo()
    torch.set_rng_state(state)
    assert trace(model) == before


@every
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_edited_models_survive(edit: Callable[[Any], Edit]) -> None:
    model = built(train=False)
    model.chain._forward_hooks.clear()  # a lambda
    torch._dynamo.reset()
    edit(model)
    wanted = model(X)
    close(copy.deepcopy(model)(X), wanted)
    close(pickle.loads(pickle.dumps(model))(X), wanted)
    if edit in (EDITS["insert all"], EDITS["remove"]):
        close(torch.compile(model, fullgraph=True, backend="eager")(X), wanted)
    wanted.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_edited() -> None:
    model = built(train=False)
    relu = model.blocks[0].relu
    edit = replace(model, "*.relu", lambda old: nn.PReLU(), example=X)
    assert edit.names == ("blocks.0.relu", "blocks.1.relu", "blocks.2.relu")
    assert edit.parameters == (115, 117)
    assert str(edit).endswith("ReLU -> PReLU; parameters 115 -> 117; shapes (3, 4) -> (3, 4)")
    assert model.blocks[0].relu is model.blocks[1].relu is not model.blocks[2].relu
    assert [m.training for m in (model.blocks[0].relu, model.blocks[2].relu)] == [False, False]
    inner = replace(model, "blocks.1", Block())  # one name of two
    assert model.blocks[0].relu is not model.blocks[1].relu
    other = replace(model, "blocks.0.relu", nn.Tanh())
    with pytest.raises(RuntimeError, match=r"relu changed since.*last one first"):
        edit.undo()
    for one in (other, inner, edit):
        one.undo()
    assert model.blocks[1].relu is relu
    assert replace(model, "blocks.0.relu", nn.Tanh()).names == ("blocks.0.relu", "blocks.1.relu")
    shared = replace(model, "*.relu", nn.PReLU())
    assert model.blocks[0].relu is model.blocks[2].relu
    shared.undo()


def test_modes_and_sharing() -> None:
    model, new = built(), nn.Sequential(nn.GELU()).eval()
    edit = replace(model, "chain.1", new)
    assert new.training
    assert new[0].training
    edit.undo()
    assert not new.training
    seen: list[nn.Module] = []
    replace(model, "blocks.?", lambda old: seen.append(old) or nn.Sequential(old, nn.Tanh().eval()))  # type: ignore[func-returns-value]
    assert len(seen) == 2, "one for each old module"
    assert model.blocks[0] is model.blocks[1] is not model.blocks[2]
    assert model.blocks[2][1].training
    assert not model.blocks[2][0].norm.training, "what was in the model keeps its own"


def test_insertions() -> None:
    model, names = built(train=False), [*built().state_dict()]
    hidden = model.blocks[2].linear(X)
    first = insert_after(model, "blocks.2.linear", nn.Tanh())
    second = insert_after(model, "blocks.2.linear", lambda old: nn.Linear(4, 4))
    close(model.blocks[2].linear(X), model.blocks[2].linear.after_1(hidden.tanh()))
    assert [k for k in model.state_dict() if "after" not in k] == names
    with pytest.raises(RuntimeError, match="after changed since"):
        first.undo()
    second.undo()
    close(model.blocks[2].linear(X), hidden.tanh())
    first.undo()
    wanted = model.chain(X) - 1
    insert_after(model, "chain", nn.Tanh())
    close(model.chain(X), wanted.tanh() + 1)
    assert [*model.chain._modules] == ["0", "1", "2", "3"]
    edit = insert_after(model, "blocks.[01]", nn.Tanh())
    assert edit.names == ("blocks.0", "blocks.1")
    edit.undo()
    assert not model.blocks[0]._forward_hooks
    named = nn.Sequential()
    named.add_module("fc", nn.Linear(4, 4))
    box = nn.ModuleDict({"named": named})
    insert_after(box, "named", nn.ReLU())
    assert [*named._modules] == ["fc", "after"]
    assert not named._forward_hooks


def test_removal() -> None:
    model = built(train=False)
    names = [*model.state_dict()]
    remove(model, "blocks.2", example=X)
    remove(model, "chain.1", example=X)
    kept = [name for name in names if not name.startswith("blocks.2")]
    assert [*model.state_dict()] == kept
    assert torch.equal(model.chain(X), model.chain[2](model.chain[0](X)) + 1)


any_: Any = {"class": nn.GELU, "number": lambda old: 3, "path": 3}
FAILURES: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "unknown": (lambda m: replace(m, "blocks.0.rel", nn.GELU()), ValueError, "nearest: blocks.0.relu"),
    "no match": (lambda m: remove(m, "*.gelu"), ValueError, r"no module of the model matches '\*.gelu'"),
    "root": (lambda m: remove(m, ""), ValueError, "the model itself cannot be edited"),
    "call without example": (lambda m: insert_after(m, "chain#1", nn.Tanh()), ValueError, "give example="),
    "call of one": (lambda m: replace(m, "chain#1", nn.Tanh(), example=X), ValueError, "chain is called 1 times"),
    "call of an alias": (lambda m: replace(m, "blocks.0#1", nn.Tanh(), example=X), ValueError, "several names"),
    "no path": (lambda m: remove(m, any_["path"]), TypeError, "got int"),
    "nested": (lambda m: remove(m, "blocks.2*"), ValueError, "blocks.2 and blocks.2.drop, which is inside"),
    "class": (lambda m: replace(m, "chain.1", any_["class"]), TypeError, "got the class GELU"),
    "no module": (lambda m: replace(m, "*.relu", any_["number"]), TypeError, "blocks.0.relu: wanted a module.*got int"),
    "dtype": (lambda m: replace(m, "head", nn.Linear(4, 2).double()), ValueError, r"float32, the new.*float64.*\.to\("),
    "dtype of the model": (lambda m: insert_after(m, "chain.1", nn.PReLU().half()), ValueError, "dtype torch.float32"),
    "device": (lambda m: replace(m, "head", nn.Linear(4, 2).to("meta")), ValueError, "device cpu, the new.*of meta"),
    "cycle": (lambda m: replace(m, "chain.1", m.chain), ValueError, "contains the place"),
    "cycle below": (lambda m: insert_after(m, "chain.1", nn.Sequential(m.chain[1])), ValueError, "contains the place"),
    "out": (lambda m: replace(m, "head", nn.Linear(4, 3)), ValueError, "output size 3, the old one 2"),
    "in": (lambda m: replace(m, "chain.2", nn.Linear(6, 4)), ValueError, "input size 6, the old one 5"),
    "inserted": (lambda m: insert_after(m, "head", nn.Linear(2, 3)), ValueError, "gives size 2, the.*makes 3 of 2"),
    "removed": (lambda m: remove(m, "chain.0"), ValueError, "makes size 5 of 4"),
    "alias": (lambda m: insert_after(m, "blocks.0", nn.Tanh()), ValueError, "blocks.0 is also blocks.1"),
    "list": (lambda m: insert_after(m, "blocks", nn.Tanh()), ValueError, "a ModuleList, into which nothing"),
    "example": (lambda m: replace(m, "chain", nn.Tanh(), example=X[:, :3]), ValueError, "example, before any edit"),
    "runs not": (
        lambda m: replace(m, "chain.0", nn.Linear(4, 6), example=X),
        ValueError,
        r"no longer runs.*gave \(3, 5\) before and \(3, 6\) after. RuntimeError: mat1 and mat2",
    ),
    "shape": (
        lambda m: replace(m, "chain", nn.Flatten(0), example=X),
        ValueError,
        r"no longer runs.*\(3, 4\) before and \(12,\) after",
    ),
    "shape at the place": (
        lambda m: insert_after(m, "blocks.2", nn.Unflatten(1, (1, 4)), example=X),
        ValueError,
        r"changes the shape at its place from \(3, 4\) to \(3, 1, 4\)",
    ),
    "kind of example": (
        lambda m: remove(m, "chain.1", example=[X]),
        TypeError,
        "a tuple of the model's arguments, a dict.*got list",
    ),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failing_edit_leaves_no_trace(failure: tuple[Callable[[Any], Any], type[Exception], str]) -> None:
    edit, kind, message = failure
    model = built()
    model.head.weight.requires_grad_(False)
    before, random = trace(model), torch.get_rng_state()
    with pytest.raises(kind, match=f"(?s){message}"):
        edit(model)
    torch.set_rng_state(random)
    assert trace(model) == before


def test_shapes_may_change_when_asked() -> None:
    model = built()
    edit = insert_after(model, "blocks.2", nn.Unflatten(1, (1, 4)), example=X, keep_shape=False)
    assert edit.shapes == (((3, 4),), ((3, 1, 4),))
    replace(model, "head", nn.Linear(4, 9), keep_shape=False)
    assert model(X).shape == (3, 1, 9)


def test_trial_leaves_no_trace() -> None:
    """Random state, running statistics, weights that a look-up shortens, and the example."""
    model, x, ids = built(), X.clone(), torch.tensor([1, 2])
    model.blocks[2].linear = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    model.blocks[0] = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    model.blocks.append(Counter())
    before, random = trace(model), torch.get_rng_state()
    replace(model, "head", model.head, example=x)
    assert torch.equal(x, X)
    assert torch.equal(random, torch.get_rng_state())
    assert trace(model) == before
    words = Words()
    first = trace(words)
    replace(words, "second", words.second, example=ids)
    assert trace(words) == first


def test_ties_are_not_broken_unasked() -> None:
    model, ids = Words(), torch.tensor([1, 2])
    before = trace(model)
    for where in ("first", "words"):
        new = nn.Linear(4, 5) if where == "first" else nn.Embedding(5, 4)
        with pytest.raises(ValueError, match=r"is tied to .*weight: tie the new module too.*break_ties=True"):
            replace(model, where, new)
        with pytest.raises(ValueError, match="is tied to"):
            remove(model, where, keep_shape=False)
        assert trace(model) == before
    del model.first
    with pytest.raises(ValueError, match=r"words is borrowed by second.embedding"):
        replace(model, "words", nn.Embedding(5, 4))
    model = Words()
    new = nn.Linear(4, 5)
    new.weight = model.words.weight
    replace(model, "first", new)
    replace(model, "words", lambda old: nn.Sequential(old), example=ids)
    edit = replace(model, "first", nn.Linear(4, 9), break_ties=True, example=ids)
    assert edit.shapes == (((2, 5),), ((2, 9),))
    assert not any("first.weight" in x.names for x in sharing_report(model).tensors)


class Views(nn.Module):
    """A parameter, a view of it as a parameter, one as a buffer and one as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.other = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(2), requires_grad=False)
        self.part = nn.Parameter(self.whole.data[2:])
        self.register_buffer("seen", self.whole.data[1:4])
        self.plain = self.whole.data.view(2, 3).T


def test_clone() -> None:
    for model in (built(), Words(), Views(), nn.Sequential(weight_norm(nn.Linear(2, 2)), nn.LSTM(2, 2))):
        copied: Any = clone(model)
        close(dict(copied.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
        assert sharing_report(copied) == sharing_report(model)
        mine, theirs = ({t.untyped_storage().data_ptr() for t in m.state_dict().values()} for m in (copied, model))
        assert not mine & theirs
        assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]
        assert [m.training for m in copied.modules()] == [m.training for m in model.modules()]
    views: Any = clone(Views())
    views.whole.data.copy_(torch.arange(6))
    assert views.part.tolist() == [2, 3, 4, 5]
    assert views.seen.tolist() == [1, 2, 3]
    assert views.plain.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert isinstance(views.part, nn.Parameter)
    words: Any = clone(Words())
    assert words.second.embedding is words.words


def test_clone_afresh() -> None:
    model: Any = nn.Sequential(built(), nn.TransformerEncoderLayer(4, 2, 8), Words()).double()
    model[0].head.bias.requires_grad_(False)
    model[0](X.double())
    before = trace(model)
    copied: Any = clone(model, copy_weights=False)
    assert trace(model) == before
    assert sharing_report(copied) == sharing_report(model)
    for (name, p), q in zip(copied.named_parameters(), model.parameters(), strict=True):
        assert p.dtype == torch.float64
        assert p.requires_grad == q.requires_grad
        assert p.isfinite().all()
        constant = "norm" in name or name.endswith(("in_proj_bias", "out_proj.bias", "second.bias"))
        assert constant or not (p == q).any(), name
    norm = copied[0].blocks[0].norm
    assert not norm.running_mean.any()
    assert model[0].blocks[0].norm.running_mean.any()
    assert len(copied[0].chain._forward_hooks) == 1
    assert copied[2].words.weight.std() > 0.5  # the embedding's own draw, not the head's
    with pytest.raises(ValueError, match=r"no fresh weights for the model \(Views: whole, other, part\): give each"):
        clone(Views(), copy_weights=False)


class Pretrained(nn.Module):
    """With the initialisation of Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.inner = nn.Sequential(nn.Linear(3, 3), Views())

    def _init_weights(self, module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            p.fill_(7.0)


def test_clone_afresh_by_the_model_around() -> None:
    copied: Any = clone(nn.Sequential(Pretrained(), nn.Linear(3, 3)), copy_weights=False)
    assert all((p == 7).all() for p in copied[0].parameters())
    assert (copied[1].weight.abs() < 1).all()
    assert copied[0].inner[1].seen.tolist() == [7, 7, 7]


def test_edits_are_pickled_with_their_model() -> None:
    model = built()
    model.chain._forward_hooks.clear()
    before = [x[0] for x in trace(model)]
    file = io.BytesIO(pickle.dumps((model, insert_after(model, "head", nn.Tanh()))))
    again, edit = pickle.load(file)
    edit.undo()
    assert [x[0] for x in trace(again)] == before
    assert not again.head._forward_hooks


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.relu(self.block(x))
        return self.head(x)  # type: ignore[no-any-return]


def test_one_call() -> None:
    """Of a module that is called several times; undone in reverse, nothing is left."""
    torch.manual_seed(0)
    model, new = Loop(), nn.Linear(4, 4)
    model.register_forward_pre_hook(lambda *_: None)
    before, block = trace(model), model.block
    expected = model(X)
    second = replace(model, "block#1", new, example=X)
    x = torch.relu(block(torch.relu(new(torch.relu(block(X))))))
    close(model(X), model.head(x), rtol=0, atol=0)
    assert second.parameters == (30, 50)
    third = insert_after(model, "block#2", nn.Tanh(), example=X)
    first = remove(model, "block#0", example=X)
    x = torch.relu(torch.tanh(block(torch.relu(new(torch.relu(X))))))
    close(model(X), model.head(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="undo the later edits first"):
        second.undo()
    for edit in (first, third, second):
        edit.undo()
    assert trace(model) == before
    close(model(X), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no longer runs"):
        replace(model, "block#1", nn.Linear(4, 3), example=X)
    assert trace(model) == before


class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.b(self.a(self.a(x))))  # type: ignore[no-any-return]


def test_one_call_each_of_two_modules() -> None:
    """The way back from the second leaves the first counting its calls."""
    model = Loops()
    first = replace(model, "a#1", nn.Linear(4, 4), example=X)
    between, expected = trace(model), model(X)
    second = replace(model, "b#0", nn.Linear(4, 4), example=X)
    assert not torch.equal(model(X), expected)
    second.undo()
    assert trace(model) == between
    close(model(X), expected, rtol=0, atol=0)
    first.undo()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
