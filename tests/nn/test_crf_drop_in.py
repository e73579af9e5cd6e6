"""The drop-in promise: the same parameters, values, gradients, paths and words as `torchcrf.CRF`, and what it lacks."""

import copy
import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyseq.nn import CRF
from pyseq.nn.crf import Reduction

ROOM = "chain"
torchcrf = pytest.importorskip("torchcrf", reason="compares with pytorch-crf: pip install pytorch-crf==0.7.2")

K = 4


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


def test_signatures_parameters_and_checkpoints() -> None:
    for method in ("__init__", "forward", "decode"):
        ours, peer = (inspect.signature(getattr(cls, method)).parameters for cls in (CRF, torchcrf.CRF))
        positional = {name: p.default for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY}
        assert list(positional.items()) == [(name, p.default) for name, p in peer.items()]
    made = []
    for cls in (CRF, torchcrf.CRF):
        torch.manual_seed(7)
        made.append(cls(K, batch_first=True))
    assert repr(made[0]) == repr(made[1])
    assert [name for name, _ in made[0].named_parameters()] == [name for name, _ in made[1].named_parameters()]
    assert all(torch.equal(x, y) for x, y in zip(made[0].parameters(), made[1].parameters(), strict=True))
    CRF(K).load_state_dict(made[1].state_dict(), strict=True)
    torchcrf.CRF(K).load_state_dict(made[0].state_dict(), strict=True)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "token_mean"])
@pytest.mark.parametrize(("batch_first", "dtype"), [(False, torch.float32), (True, torch.float64)])
@pytest.mark.parametrize("lengths", [None, [9, 4, 1]])
def test_value_gradients_and_paths(batch_first: bool, lengths: Any, dtype: torch.dtype, reduction: Reduction) -> None:
    """Within twice the peer's own error against float64, and one rounding."""
    emissions, tags, mask = batch(batch_first, torch.arange(9) < torch.tensor(lengths or [9, 9, 9]).unsqueeze(1))
    ours, peer = twins(batch_first)
    exact = copy.deepcopy(peer).double()
    results, decoded = [], []
    for crf in (ours.to(dtype), peer.to(dtype), exact):
        f = emissions.to(crf.transitions.dtype, copy=True).requires_grad_()
        # torchcrf's own default mask is uint8, which torch warns about
        given = None if crf is ours and lengths is None else mask
        value = crf(f, tags, given, reduction=reduction)
        value.sum().backward()
        results.append([value.detach(), f.grad, *(p.grad for p in crf.parameters())])
        decoded.append(crf.decode(f, given))
    assert decoded[0] == decoded[1]
    assert all(type(tag) is int for row in decoded[0] for tag in row)
    scale = max(1.0, results[2][0].abs().max().item())
    # float32: the oracle is exact by comparison. float64: the oracle rounds at each of 9 steps, and so may we
    roundings = 1 if dtype == torch.float32 else 2 * 9
    for found, theirs, oracle in zip(*results, strict=True):
        assert (found.shape, found.dtype) == (theirs.shape, theirs.dtype)
        allowed = 2 * (theirs.double() - oracle).abs().max() + roundings * torch.finfo(dtype).eps * scale
        assert (found.double() - oracle).abs().max() <= allowed


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_same_words_for_bad_arguments(batch_first: bool) -> None:
    """Those that test_crf.py spells out."""
    f, y, m = torch.zeros(3, 2, K), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.bool)
    ours, peer = twins(batch_first)
    bad: list[tuple[Any, ...]] = [(f[0], y, m), (f[..., 1:], y, m), (f, y[1:], m), (f, y.T, m), (f, y[0], m)]
    calls: list[tuple[Any, Any, tuple[Any, ...]]] = [
        (peer, ours, arguments) for arguments in (*bad, (f, y, m[1:]), (f, y, m.T), (f, y, m, "total"))
    ]
    for theirs, call, arguments in (*calls, (torchcrf.CRF, CRF, (0,)), (torchcrf.CRF, CRF, (-1,))):
        with pytest.raises(ValueError, match=r".") as caught:
            theirs(*arguments)
        with pytest.raises(ValueError, match=f"^{re.escape(str(caught.value))}$"):
            call(*arguments)


def test_where_we_differ() -> None:
    """torchcrf refuses a masked first step (BERT's [CLS]), and scores transitions into and out of a hole that no path
    takes: its likelihood can exceed 1."""
    ours, peer = twins(True)
    emissions, tags, mask = batch(True, torch.tensor([[False, True, True]]))
    with pytest.raises(ValueError, match="first timestep"):
        peer(emissions, tags, mask)
    assert torch.equal(ours(emissions, tags, mask), ours(emissions[:, 1:], tags[:, 1:]))
    for crf in (ours, peer):
        nn.init.constant_(crf.transitions[0], 8)  # out of tag 0, in the hole
        nn.init.constant_(crf.start_transitions[1], 8)  # into tag 1, before it
    emissions, tags, mask = torch.zeros(1, 3, K), torch.tensor([[1, 0, 0]]), torch.tensor([[True, False, True]])
    assert peer(emissions, tags, mask) > 0 > ours(emissions, tags, mask)
