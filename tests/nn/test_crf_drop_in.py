"""The drop-in promise: the same parameters, values, gradients, paths and words as `torchcrf.CRF`, and what it lacks."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyseq.nn import CRF
from pyseq.nn.crf import Reduction

ROOM = "chain"
torchcrf = pytest.importorskip("torchcrf", reason="compares with pytorch-crf: pip install pytorch-crf==0.7.2")

K = 4
LAYOUTS = pytest.mark.parametrize("batch_first", [False, True])


def right_padded(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def twins(batch_first: bool) -> tuple[CRF, Any]:
    """Ours and torchcrf's with the same parameters."""
    ours, peer = CRF(K, batch_first), torchcrf.CRF(K, batch_first)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    peer.load_state_dict(ours.state_dict())
    return ours, peer


def batch(batch_first: bool, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Emissions, tags and mask in a module's layout, of a mask (B, T)."""
    given = torch.randn(*mask.shape, K), torch.randint(K, mask.shape), mask
    emissions, tags, mask = (x if batch_first else x.transpose(0, 1).contiguous() for x in given)
    return emissions, tags, mask


def message(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        call(*arguments)
    return str(caught.value)


def test_constructor_repr_parameters_and_seed() -> None:
    assert str(inspect.signature(CRF)) == str(inspect.signature(torchcrf.CRF))
    torch.manual_seed(7)
    ours = CRF(5, batch_first=True)
    torch.manual_seed(7)
    peer = torchcrf.CRF(5, batch_first=True)
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(peer))
    for (name, x), (peer_name, y) in zip(ours.named_parameters(), peer.named_parameters(), strict=True):
        assert name == peer_name
        assert torch.equal(x, y)


@pytest.mark.parametrize("method", ["forward", "decode"])
def test_positional_arguments(method: str) -> None:
    ours, peer = (inspect.signature(getattr(cls, method)).parameters for cls in (CRF, torchcrf.CRF))
    positional = {name: p.default for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY}
    assert list(positional.items()) == [(name, p.default) for name, p in peer.items()]


def test_checkpoints_load_strictly_both_ways() -> None:
    for source, target in ((torchcrf.CRF(K), CRF(K)), (CRF(K), torchcrf.CRF(K))):
        target.load_state_dict(source.state_dict(), strict=True)
        assert all(torch.equal(target.state_dict()[name], value) for name, value in source.state_dict().items())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "token_mean"])
@pytest.mark.parametrize(
    ("batch_first", "dtype", "lengths"),
    [
        (False, torch.float32, [9, 4, 1]),
        (True, torch.float32, None),
        (True, torch.float64, [9, 4, 1]),
        (False, torch.float64, [9, 9, 9]),
    ],
)
def test_value_and_gradients(
    batch_first: bool, dtype: torch.dtype, lengths: list[int] | None, reduction: Reduction
) -> None:
    """Within twice the peer's own error against float64, and one rounding."""
    emissions, tags, mask = batch(batch_first, right_padded(lengths or [9, 9, 9]))
    ours, peer = twins(batch_first)
    exact = torchcrf.CRF(K, batch_first).double()
    exact.load_state_dict(ours.state_dict())
    results = []
    for crf in (ours.to(dtype), peer.to(dtype), exact):
        f = emissions.to(crf.transitions.dtype, copy=True).requires_grad_()
        # torchcrf's own default mask is uint8, which torch warns about
        value = crf(f, tags, None if crf is ours and lengths is None else mask, reduction=reduction)
        value.sum().backward()
        results.append([value.detach(), f.grad, *(p.grad for p in crf.parameters())])
    scale = max(1.0, results[2][0].abs().max().item())
    # float32: the oracle is exact by comparison. float64: the oracle rounds at each of 9 steps, and so may we
    roundings = 1 if dtype == torch.float32 else 2 * 9
    for found, theirs, oracle in zip(*results, strict=True):
        assert (found.shape, found.dtype) == (theirs.shape, theirs.dtype)
        allowed = 2 * (theirs.double() - oracle).abs().max() + roundings * torch.finfo(dtype).eps * scale
        assert (found.double() - oracle).abs().max() <= allowed


@LAYOUTS
@pytest.mark.parametrize("lengths", [[9, 4, 1, 7], None])
def test_decode(batch_first: bool, lengths: list[int] | None) -> None:
    emissions, _, mask = batch(batch_first, right_padded(lengths or [9, 9, 9, 9]))
    ours, peer = twins(batch_first)
    found = ours.decode(emissions, None if lengths is None else mask)
    assert found == peer.decode(emissions, mask)
    assert all(type(tag) is int for row in found for tag in row)


@LAYOUTS
def test_the_same_words_for_bad_arguments(batch_first: bool) -> None:
    """Those that test_crf.py spells out."""
    for number in (0, -1):
        assert message(CRF, number) == message(torchcrf.CRF, number)
    f, y, m = torch.zeros(3, 2, K), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.bool)
    ours, peer = CRF(K, batch_first), torchcrf.CRF(K, batch_first)
    bad: list[tuple[object, ...]] = [
        *((emissions, tags, mask) for emissions in (f[0], f[..., 1:]) for tags in (y, y[1:]) for mask in (m, m[1:])),
        *((f, tags, mask) for tags in (y[1:], y.T, y[0]) for mask in (m, m[1:])),
        *((f, y, mask, "total") for mask in (m, m[1:], m.T)),
    ]
    for arguments in bad:
        assert message(ours, *arguments) == message(ours.nll, *arguments) == message(peer, *arguments)
    for arguments in ((f[0], m), (f[..., 1:], m), (f, m.T), (f, m[1:])):
        for method in (ours.decode, ours.viterbi, ours.marginals):
            assert message(method, *arguments) == message(peer.decode, *arguments)


def test_trains_along_the_same_curve() -> None:
    emissions, tags, mask = batch(True, right_padded([6, 4, 5, 2]))
    curves = []
    for crf in twins(True):
        encoder = nn.Linear(K, K, bias=False)
        nn.init.eye_(encoder.weight)
        optimizer = torch.optim.SGD([*crf.parameters(), *encoder.parameters()], lr=0.1)
        curve = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = -crf(encoder(emissions), tags, mask, reduction="mean")
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    assert curves[0][-1] < curves[0][0] / 2
    # each of 20 steps rounds over 6 time steps, and the loss contracts
    budget = 20 * 6 * torch.finfo(torch.float32).eps * max(1.0, curves[1][0].item())
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=budget)


def test_where_we_differ() -> None:
    """torchcrf refuses a masked first step (BERT's [CLS]), and scores transitions into and out of a hole that no path
    takes: its likelihood can exceed 1."""
    ours, peer = twins(True)
    emissions, tags, mask = batch(True, torch.tensor([[False, True, True]]))
    assert "first timestep" in message(peer, emissions, tags, mask)
    assert torch.equal(ours(emissions, tags, mask), ours(emissions[:, 1:], tags[:, 1:]))
    with torch.no_grad():
        for crf in (ours, peer):
            crf.transitions[0].fill_(8)  # out of tag 0, in the hole
            crf.start_transitions[1] = 8  # into tag 1, before it
    emissions, tags, mask = torch.zeros(1, 3, K), torch.tensor([[1, 0, 0]]), torch.tensor([[True, False, True]])
    assert peer(emissions, tags, mask) > 0 > ours(emissions, tags, mask)
