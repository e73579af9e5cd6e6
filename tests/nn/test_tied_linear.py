"""The tied head: its values and gradients, and that nothing that is done to a model breaks the tie."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close as close

from pyseq.nn import TiedLinear

ROOM = "surgery"
WORDS, DIM = 7, 4
IDS = torch.tensor([[1, 2, 0], [2, 6, 5]])


class Model(nn.Module):
    def __init__(self, bias: bool = True, **options: Any) -> None:
        super().__init__()
        self.words: Any = nn.Embedding(WORDS, DIM, **options)
        self.head: Any = TiedLinear(self.words, bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).tanh())  # type: ignore[no-any-return]


def assert_tied(model: Any) -> None:
    """What moves the embedding moves the logits as much."""
    assert model.head.embedding is model.words
    with torch.no_grad():
        for p in model.words.parameters():
            p.normal_()
    x = torch.randn(2, DIM, dtype=model.head.weight.dtype)
    close(model.head(x), linear(x, model.words.weight, model.head.bias), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"padding_idx": 0}], ids=str)
def test_values_and_gradients_are_the_sum_of_both_uses(bias: bool, options: dict[str, Any]) -> None:
    model = Model(bias, **options).double()
    assert [*model.state_dict()] == ["words.weight", "head.bias"][: 1 + bias]
    assert not bias or (not model.head.bias.any() and model.head.bias.shape == (WORDS,))
    if bias:
        nn.init.normal_(model.head.bias)
    matrix = model.words.weight.detach().clone().requires_grad_()
    looked = matrix[IDS] if "padding_idx" not in options else torch.where((IDS > 0)[..., None], matrix[IDS], 0)
    wanted = looked.tanh() @ matrix.T + (model.head.bias if bias else 0)
    found = model(IDS)
    close(found, wanted)
    (found - 1).square().sum().backward()
    (wanted - 1).square().sum().backward()
    assert model.words.weight.grad.layout == torch.strided
    close(model.words.weight.grad, matrix.grad)
    assert model.words.weight.grad[0].any(), "the row of padding is trained"


def test_ties_survive(tmp_path: Path) -> None:
    assert_tied(copy.deepcopy(Model()))
    assert_tied(pickle.loads(pickle.dumps(Model())))
    assert_tied(Model().to(torch.bfloat16))
    assert_tied(Model().to("meta").to_empty(device="cpu").requires_grad_(False))
    model = Model()
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)
    assert_tied(model)
    model.words.weight = nn.Parameter(torch.randn(WORDS, DIM))
    assert_tied(model)
    weight_norm(model.words)
    assert_tied(copy.deepcopy(model))
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    x = torch.randn(DIM)
    alone = copy.deepcopy(model.head)
    close(alone(x), model.head(x))
    assert alone.embedding is not model.words


def test_functional_call_and_export() -> None:
    model = Model()
    other = torch.randn(WORDS, DIM)
    close(functional_call(model, {"words.weight": other}, IDS), other[IDS].tanh() @ other.T)
    exported = torch.export.export(model, (IDS,))
    assert [*exported.state_dict] == ["words.weight", "head.bias"]
    close(exported.module()(IDS), model(IDS))
    close(torch.fx.symbolic_trace(model)(IDS), model(IDS))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_and_autocast(backend: str) -> None:
    model = Model()
    fast = torch.compile(model, fullgraph=True, backend=backend)
    gradients = []
    for call in (model, fast):
        model.zero_grad()
        call(IDS).square().sum().backward()
        gradients.append(model.words.weight.grad)
    close(*gradients)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(IDS).dtype == model(IDS).dtype == torch.bfloat16
        assert model.head(torch.randn(DIM, dtype=torch.float16)).dtype == torch.bfloat16


def test_max_norm_shortens_in_the_look_up() -> None:
    model = Model(max_norm=0.1)
    model(IDS).sum().backward()
    norms = model.words.weight.detach().norm(dim=1)
    close(norms[[0, 1, 2, 5, 6]], torch.full((5,), 0.1))
    assert (norms[[3, 4]] > 0.1).all()
    found = model(IDS).sum()
    model.words(torch.tensor([3]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_errors() -> None:
    model, wrong = Model(), nn.Linear(DIM, WORDS)
    with pytest.raises(TypeError, match=re.escape("must be an nn.Embedding, the module itself, got Parameter")):
        TiedLinear(model.words.weight)
    with pytest.raises(TypeError, match="got Linear"):
        TiedLinear(wrong)  # type: ignore[arg-type]
    for shape in ((2, 3), ()):
        with pytest.raises(ValueError, match=re.escape(f"(..., dim=4), got {shape}")):
            model.head(torch.zeros(shape))
    with pytest.raises(TypeError, match=re.escape("dtype torch.float32, got torch.float64: cast either")):
        model.head(torch.zeros(2, DIM, dtype=torch.float64))
    with pytest.raises(AttributeError):
        model.head.weight = None
    assert repr(model.head) == "TiedLinear(dim=4, num_embeddings=7, bias=True)"
    nn.init.ones_(model.head.bias)
    before = model.words.weight.clone()
    model.head.reset_parameters()
    assert not model.head.bias.any()
    assert torch.equal(before, model.words.weight)


def test_two_processes(on_two: Callable[[str], None]) -> None:
    """DDP and FSDP2 over two gloo processes train as one process with the joined batch."""
    on_two("tied_on_two.py")
