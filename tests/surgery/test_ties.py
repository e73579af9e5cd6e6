"""Sharing is seen, made, undone, saved and loaded; and how torch itself treats what is tied."""

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close as close

from pyseq.nn import TiedLinear
from pyseq.surgery import load_state_dict, share, sharing_report, state_dict

ROOM = "surgery"


class Tied(nn.Module):
    """An embedding tied to a head, and one block under two names, with state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words: Any = nn.Embedding(5, 4)
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.blocks: Any = nn.ModuleList([block, block])
        self.head: Any = nn.Linear(4, 5)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


class Extra(nn.Linear):
    """With extra state."""

    notes: Any = ("new",)

    def get_extra_state(self) -> Any:
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        self.notes = state


def same(a: Any, b: Any) -> None:
    close(dict(a), dict(b), rtol=0, atol=0, equal_nan=True)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_report() -> None:
    model = Tied()
    report = sharing_report(model)
    shared = {x.names: x for x in report.tensors}
    assert shared[("words.weight", "head.weight")][1:] == ("one tensor", (5, 4), 80, False)
    assert shared[("blocks.0.0.bias", "blocks.1.0.bias")].by_module
    assert [x.names for x in report.modules] == [("blocks.0", "blocks.1")]
    assert report.parameters == sum(p.numel() for p in model.parameters()) == 20 + 28 + 5
    assert report.by_name == 20 + 2 * 28 + 25
    assert report.bytes == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert report.bytes_saved == 80 + sum(t.nbytes for t in [*model.blocks[0].parameters(), *model.blocks[0].buffers()])
    lines = str(report).splitlines()
    assert [*map(str.split, lines)][:2] == [
        ["module", "Sequential", "28", "parameters", "blocks.0,", "blocks.1"],
        ["one", "tensor", "(5,", "4)", "80", "bytes", "saved", "words.weight,", "head.weight"],
    ]
    assert len(lines) == 4
    assert sharing_report(copy.deepcopy(model)) == report


def test_report_of_views_and_borrowed_modules() -> None:
    flat = torch.randn(12)
    model = nn.ParameterList([flat[:6], flat[6:], flat[4:8].view(2, 2), flat[:6], torch.zeros(3)])
    (report, *others) = sharing_report(model).tensors
    assert not others
    assert report[:4] == (("0", "1", "2", "3"), "overlapping views", (6,), 4 * (6 + 6 + 4 + 6 - 12))
    (report,) = sharing_report(nn.ParameterList([flat, flat, flat[:0]])).tensors
    assert report[1:4] == ("same memory", (12,), 48)
    assert not sharing_report(nn.ParameterList([flat[:6], flat[6:]])).tensors
    words = nn.Embedding(3, 2)
    borrows = sharing_report(nn.ModuleDict({"words": words, "head": TiedLinear(words)}))
    assert borrows.borrowed == (("head.embedding", "words"),)
    assert "words by head.embedding" in str(borrows)
    long = nn.Sequential(*[nn.ReLU()] * 9)
    assert "0, 1, ... (9 names), 8" in str(sharing_report(long))


def by_meta(model: Any) -> None:
    model.to("meta")
    assert ("words.weight", "head.weight") not in {x.names for x in sharing_report(model).tensors}
    model.to_empty(device="cpu")


def by_conversion(model: Any) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def by_assigning(model: Any) -> None:
    model.load_state_dict(copied(model), assign=True)


def by_parametrizing(model: Any) -> None:
    weight_norm(model.head)


def by_a_new_parameter(model: Any) -> None:
    model.head.weight = nn.Parameter(torch.zeros(5, 4))


@pytest.mark.parametrize("change", [by_meta, by_conversion, by_assigning, by_parametrizing, by_a_new_parameter])
def test_what_breaks_ties_is_seen(change: Callable[[Any], None]) -> None:
    model = Tied()
    before = sharing_report(model)
    change(model)
    after = sharing_report(model)
    assert after != before
    assert ("words.weight", "head.weight") not in {x.names for x in after.tensors}
    assert after.modules == before.modules


def test_what_keeps_ties() -> None:
    """Among it torch's own loader, which lets the last of two values win in silence."""
    model = Tied()
    before = sharing_report(model)
    assert sharing_report(model.double().float()) == before
    nn.init.normal_(model.head.weight)
    state = copied(model)
    state["head.weight"] += 1
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(model.words.weight, state["head.weight"])
    assert sharing_report(model) == before
    assert "head.weight" in model.state_dict()
    assert "head.weight" not in dict(model.named_parameters())
    other, ids = torch.zeros(5, 4), torch.tensor([1, 2])
    close(functional_call(model, {"words.weight": other}, ids), model.head.bias.expand(2, 5))
    untied = functional_call(model, {"words.weight": other}, ids, tie_weights=False)
    assert not torch.equal(untied, model.head.bias.expand(2, 5))
    loaded = torch.load(io.BytesIO(saved(model.state_dict())))
    assert loaded["words.weight"].data_ptr() == loaded["head.weight"].data_ptr()


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def test_share_and_undo() -> None:
    a, b = (nn.Sequential(nn.LSTM(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    before, tensors, x = copied(b), [*b.parameters(), *b.buffers()], torch.randn(2, 3)
    edit = share(a, b)
    assert all(p is q for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert all(p is q for p, q in zip(a.buffers(), b.buffers(), strict=True))
    close(b[0](x), a[0](x))  # the LSTM keeps a list of its weights
    n = sum(p.numel() for p in a.parameters())
    assert edit.parameters == (2 * n, n)
    assert str(edit).startswith("share 0.weight_ih_l0, ")
    edit.undo()
    assert all(p is q for p, q in zip([*b.parameters(), *b.buffers()], tensors, strict=True))
    same(before, b.state_dict())
    lstm: Any = b[0]
    assert lstm._flat_weights[0] is lstm.weight_ih_l0
    with pytest.raises(RuntimeError, match="undone already"):
        edit.undo()
    edit = share(a, b)
    b[1].weight = nn.Parameter(torch.zeros(4))
    with pytest.raises(RuntimeError, match="weight changed since this edit"):
        edit.undo()
    assert b[0].weight_ih_l0 is a[0].weight_ih_l0


def test_share_errors() -> None:
    a, b = nn.Linear(2, 3), nn.Linear(4, 3, bias=False).double()
    before = copied(b)
    with pytest.raises(ValueError, match="cannot use") as error:
        share(a, b)
    for part in (
        "bias is in a alone",
        "weight has shape (3, 2) in a, (3, 4) in b",
        "torch.float32 in a, torch.float64",
    ):
        assert part in str(error.value)
    same(before, b.state_dict())
    with pytest.raises(ValueError, match="one module"):
        share(a, a)
    layer = nn.Linear(2, 2)
    pair = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=re.escape("1.bias and 0.bias are one in b, two in a")):
        share(pair, nn.Sequential(layer, layer))
    shared = nn.Sequential(layer, layer)
    share(shared, pair)
    assert pair[0].weight is pair[1].weight is layer.weight


def test_state_dict_round_trip() -> None:
    model, other, untied = Tied(), Tied(), Tied()
    by_a_new_parameter(untied)
    untied.blocks[1] = copy.deepcopy(untied.blocks[0])
    small = state_dict(model)
    assert [*small] == [k for k in model.state_dict() if k != "head.weight" and not k.startswith("blocks.1")]
    assert small["words.weight"].data_ptr() == model.words.weight.data_ptr()
    assert not small["words.weight"].requires_grad
    large = state_dict(model, ties="copy")
    same(large, model.state_dict())
    assert len({t.untyped_storage().data_ptr() for t in large.values()}) == len(large)
    again: Any = torch.load(io.BytesIO(saved(small)), weights_only=True)
    assert again._metadata[""]["ties"]["head.weight"] == "words.weight"
    plain = dict(small)
    report = sharing_report(other)
    for state in (small, large, again, plain, model.state_dict()):
        for p in other.parameters():
            nn.init.zeros_(p)
        load_state_dict(other, state)
        same(other.state_dict(), model.state_dict())
        assert sharing_report(other) == report
    load_state_dict(untied, again)
    same(untied.state_dict(), model.state_dict())
    assert not sharing_report(untied).tensors
    back = {k: v for k, v in model.state_dict().items() if k != "words.weight"}
    load_state_dict(other, back)
    with pytest.raises(ValueError, match="ties must be 'drop' or 'copy', got 'keep'"):
        state_dict(model, "keep")  # type: ignore[arg-type]


def test_copies_suit_safetensors() -> None:
    safe = pytest.importorskip("safetensors.torch", reason="compares with safetensors: pip install safetensors")
    model = Tied()
    with pytest.raises(RuntimeError, match="share memory"):
        safe.save(dict(model.state_dict()))
    for ties in ("drop", "copy"):
        loaded = safe.load(safe.save(state_dict(model, ties)))
        same(loaded, state_dict(model, ties))
        load_state_dict(Tied(), loaded)


def test_load_errors_leave_the_model() -> None:
    model = nn.ModuleDict({"a": Extra(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    before = copied_extra = state_dict(model, "copy")
    new = {k: v + 1 if isinstance(v, Tensor) else ("loaded",) for k, v in copied_extra.items()}

    def refused(kind: type[Exception], match: str, state: Any) -> None:
        with pytest.raises(kind, match=match):
            load_state_dict(model, state)
        same(
            {k: v for k, v in model.state_dict().items() if k != "a._extra_state"},
            {k: v for k, v in before.items() if k != "a._extra_state"},
        )
        assert model.state_dict()["a._extra_state"] == ("new",)

    refused(ValueError, "a.weight and b.weight are one tensor", {**new, "b.weight": new["b.weight"] * 2})
    refused(RuntimeError, 'Missing key.*"c.bias"', {k: v for k, v in new.items() if k != "c.bias"})
    refused(RuntimeError, 'Unexpected key.*"d"', {**new, "d": torch.zeros(1)})
    refused(RuntimeError, "size mismatch for c.bias", {**new, "c.bias": torch.zeros(3)})
    refused(RuntimeError, "Missing key.*a.weight", {k: v for k, v in new.items() if "weight" not in k})
    nan = {**new, **{k: torch.full((2, 2), torch.nan) for k in ("a.weight", "b.weight")}}
    load_state_dict(model, nan)
    assert model.state_dict()["a._extra_state"] == ("loaded",)
    assert model["b"].weight is model["a"].weight
    close(model["c"].bias, new["c.bias"])
    with pytest.raises(ValueError, match=r"a.weight is on the meta device"):
        load_state_dict(copy.deepcopy(model).to("meta"), new)
