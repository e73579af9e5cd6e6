"""nn.CRF: the drop-in promise against torchcrf, everything beyond it against brute force over all paths."""

import copy
import inspect
import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchcrf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pyseq
from pyseq import ops
from pyseq.kernels import OK, UNFIT
from pyseq.nn import CRF, crf_parameter_groups
from pyseq.nn.crf import Ignored, Reduction
from pyseq.testing import launches

K = 4
NATS = 20.0  # path scores and log Z of the small problems here are below this
REDUCTIONS: list[Reduction] = ["none", "sum", "mean", "token_mean"]
MEANINGS: list[Ignored | None] = [None, "absent", "unknown"]
LAYOUTS = pytest.mark.parametrize("batch_first", [False, True])
# torch's own warning, about itself, whenever dynamo traces an autograd.Function
INSTANTIATED = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# (B, T) = (5, 4): right and left padding, holes, a masked first step, nothing live
ANY_MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)


def right_padded(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def twins(batch_first: bool = False, dtype: torch.dtype = torch.float32, num_tags: int = K) -> tuple[CRF, torchcrf.CRF]:
    """Ours and torchcrf's with the same parameters."""
    torch.manual_seed(3)
    ours, peer = CRF(num_tags, batch_first), torchcrf.CRF(num_tags, batch_first)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    peer.load_state_dict(ours.state_dict())
    return ours.to(dtype), peer.to(dtype)


def batch(mask: Tensor, num_tags: int = K, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Emissions (B, T, K) and tags (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    emissions = torch.randn(*mask.shape, num_tags, generator=generator)
    return emissions, torch.randint(num_tags, mask.shape, generator=generator)


def laid(batch_first: bool, *tensors: Tensor) -> list[Tensor]:
    """Batch-first tensors in a module's layout, dense."""
    return [x if batch_first else x.transpose(0, 1).contiguous() for x in tensors]


def paths(crf: CRF, emissions: Tensor, live: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Every path of one sequence (T, K), over its live steps, with its score in float64."""
    start, end, transitions = (x.double() for x in (crf.start_transitions, crf.end_transitions, crf.transitions))
    rows = emissions.double()[live]
    for path in itertools.product(range(crf.num_tags), repeat=len(rows)):
        score = rows.new_zeros(())
        for k, tag in enumerate(path):
            score = score + rows[k, tag] + (transitions[path[k - 1], tag] if k else start[tag])
        yield path, score + end[path[-1]] if path else score


def brute_nll(crf: CRF, emissions: Tensor, allowed: list[set[int]], live: Tensor) -> Tensor:
    """log Z minus log Z over the paths whose tags are allowed; one set for each live step."""
    scored = list(paths(crf, emissions, live))
    agreeing = [score for path, score in scored if all(tag in tags for tag, tags in zip(path, allowed, strict=True))]
    return torch.stack([score for _, score in scored]).logsumexp(0) - torch.stack(agreeing).logsumexp(0)


def brute_nlls(crf: CRF, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
    """(B,), with -100 at a live step standing for any tag."""
    every = set(range(crf.num_tags))
    rows = []
    for f, y, live in zip(emissions, tags, mask, strict=True):
        rows.append(brute_nll(crf, f, [every if tag == -100 else {tag} for tag in y[live].tolist()], live))
    return torch.stack(rows)


def gradients(value: Tensor, crf: nn.Module, emissions: Tensor) -> dict[str, Tensor]:
    named = {"emissions": emissions, **dict(crf.named_parameters())}
    found = torch.autograd.grad(value.sum(), list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def assert_close(found: Tensor, oracle: Tensor, roundings: int, scale: float = 1.0) -> None:
    """Within so many roundings of numbers of the size `scale`, in the precision of `found`."""
    assert found.shape == oracle.shape
    found, oracle = found.detach(), oracle.detach()
    budget = roundings * torch.finfo(found.dtype).eps * max(scale, 1.0)
    torch.testing.assert_close(found.double(), oracle.double(), rtol=0, atol=budget)


def assert_as_good(ours: Tensor, peer: Tensor, oracle: Tensor, scale: float) -> None:
    """Twice the peer's own error against the float64 oracle, plus one rounding of numbers of the size `scale`."""
    assert ours.shape == peer.shape == oracle.shape
    assert ours.dtype == peer.dtype
    allowed = 2 * (peer.double() - oracle).abs().max() + torch.finfo(ours.dtype).eps * scale
    assert (ours.double() - oracle).abs().max() <= allowed


class TestDropIn:
    def test_constructor_repr_parameters_and_seed(self) -> None:
        assert str(inspect.signature(CRF)) == str(inspect.signature(torchcrf.CRF))
        torch.manual_seed(7)
        ours = CRF(5, batch_first=True)
        torch.manual_seed(7)
        peer = torchcrf.CRF(5, batch_first=True)
        assert repr(ours) == repr(peer) == "CRF(num_tags=5)"
        assert repr(nn.Sequential(ours)) == repr(nn.Sequential(peer))
        assert (ours.num_tags, ours.batch_first) == (5, True)
        for (name, x), (peer_name, y) in zip(ours.named_parameters(), peer.named_parameters(), strict=True):
            assert name == peer_name
            assert torch.equal(x, y)
            assert x.abs().max() <= 0.1
        with torch.no_grad():
            ours.transitions.fill_(9)
        torch.manual_seed(7)
        ours.reset_parameters()
        assert torch.equal(ours.transitions, peer.transitions)

    def test_positional_arguments_are_those_of_torchcrf(self) -> None:
        for name in ("forward", "decode"):
            ours, peer = (inspect.signature(getattr(cls, name)).parameters for cls in (CRF, torchcrf.CRF))
            positional = {n: p.default for n, p in ours.items() if p.kind is not p.KEYWORD_ONLY}
            assert positional == {n: p.default for n, p in peer.items()}

    def test_checkpoints_load_strictly_both_ways(self) -> None:
        ours, peer = CRF(K), torchcrf.CRF(K)
        assert set(ours.state_dict()) == {"start_transitions", "end_transitions", "transitions"}
        for source, target in ((peer, CRF(K)), (ours, torchcrf.CRF(K))):
            target.load_state_dict(source.state_dict(), strict=True)
            for name, value in source.state_dict().items():
                assert torch.equal(target.state_dict()[name], value)

    @LAYOUTS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 4, 1], None])
    def test_value_and_gradients(
        self, batch_first: bool, dtype: torch.dtype, reduction: Reduction, lengths: list[int] | None
    ) -> None:
        mask = right_padded(lengths or [9, 9, 9])
        emissions, tags = batch(mask)
        emissions, tags, mask = laid(batch_first, emissions, tags, mask)
        given_mask = None if lengths is None else mask
        ours, peer = twins(batch_first, dtype)
        _, exact = twins(batch_first, torch.float64)
        results = []
        for crf, f in ((ours, emissions.to(dtype)), (peer, emissions.to(dtype)), (exact, emissions.double())):
            f.requires_grad_()
            # torchcrf's own default mask is uint8, which torch warns about
            value = crf(f, tags, given_mask if crf is ours else mask, reduction=reduction)
            results.append({"value": value.detach(), **gradients(value, crf, f)})
        # float32: the oracle is exact by comparison. float64: the oracle rounds at each of 9 steps, and so may we
        roundings = 1 if dtype == torch.float32 else 2 * 9
        for name, oracle in results[2].items():
            scale = max(1.0, results[2]["value"].abs().max().item())
            assert_as_good(results[0][name], results[1][name], oracle, roundings * scale)

    @LAYOUTS
    @pytest.mark.parametrize("lengths", [[9, 9, 9, 9], [9, 4, 1, 7], None])
    def test_decode(self, batch_first: bool, lengths: list[int] | None) -> None:
        mask = right_padded(lengths or [9, 9, 9, 9])
        ours, peer = twins(batch_first)
        emissions, _ = batch(mask)
        emissions, mask = laid(batch_first, emissions, mask)
        found = ours.decode(emissions, None if lengths is None else mask)
        assert found == peer.decode(emissions, mask)
        assert all(type(tag) is int for row in found for tag in row)

    @LAYOUTS
    def test_uint8_masks_are_bool_masks(self, batch_first: bool) -> None:
        crf, _ = twins(batch_first)
        emissions, tags, mask = laid(batch_first, *batch(ANY_MASK), ANY_MASK)
        byte = mask.to(torch.uint8) * 255
        for ignored in MEANINGS:
            assert torch.equal(crf(emissions, tags, byte, ignored=ignored), crf(emissions, tags, mask, ignored=ignored))
        assert crf.decode(emissions, byte) == crf.decode(emissions, mask)
        for ours, wanted in zip(crf.viterbi(emissions, byte), crf.viterbi(emissions, mask), strict=True):
            assert torch.equal(ours, wanted)
        assert torch.equal(crf.marginals(emissions, byte), crf.marginals(emissions, mask))

    def test_the_same_words_for_bad_arguments(self) -> None:
        def message(call: Callable[..., object], *arguments: object) -> str:
            with pytest.raises(ValueError, match=r".") as caught:
                call(*arguments)
            return str(caught.value)

        for number in (0, -1):
            assert message(CRF, number) == message(torchcrf.CRF, number)
        emissions, tags, mask = torch.zeros(3, 2, K), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2).bool()
        bad: list[tuple[object, ...]] = [
            (emissions[0], tags, mask),
            (emissions[..., 1:], tags, mask),
            (emissions, tags[1:], mask),
            (emissions, tags.T, mask),
            (emissions, tags[0], mask),
            (emissions, tags, mask[:, 1:]),
            (emissions, tags, mask, "total"),
            # with several faults the first check speaks
            (emissions[0, 1:], tags[1:], mask[1:], "total"),
            (emissions[..., 1:], tags[1:], mask[1:], "total"),
            (emissions, tags[1:], mask[1:], "total"),
            (emissions, tags, mask[1:], "total"),
        ]
        for batch_first in (False, True):
            ours, peer = CRF(K, batch_first), torchcrf.CRF(K, batch_first)
            for arguments in bad:
                assert message(ours, *arguments) == message(peer, *arguments)
                assert message(ours.nll, *arguments) == message(peer, *arguments)
            for f, m in ((emissions[0], mask), (emissions[..., 1:], mask), (emissions, mask.T), (emissions, mask[1:])):
                for method in (ours.decode, ours.viterbi, ours.marginals):
                    assert message(method, f, m) == message(peer.decode, f, m)

    def test_shapes_are_checked_before_values(self) -> None:
        """A mask of the wrong shape, its first step off, beside tags out of range: torchcrf's words, not the ops'."""
        tags = torch.full((3, 2), 99)
        with pytest.raises(ValueError, match="emissions and mask must match"):
            CRF(K)(torch.zeros(3, 2, K), tags, torch.zeros(2, 2, dtype=torch.bool))
        with pytest.raises(ValueError, match="invalid reduction: total"):
            CRF(K)(torch.zeros(3, 2, K), tags, None, "total")  # type: ignore[arg-type]

    def test_dtypes_that_no_op_serves(self) -> None:
        emissions, tags = torch.zeros(3, 2, K), torch.zeros(3, 2, dtype=torch.long)
        with pytest.raises(TypeError, match=r"emissions must be of dtype .*, got torch.int64"):
            CRF(K)(emissions.long(), tags)
        with pytest.raises(TypeError, match=r"tags must be of dtype .*, got torch.float32"):
            CRF(K)(emissions, tags.float())
        for mask in (torch.ones(3, 2), torch.ones(3, 2, dtype=torch.long)):
            for ignored in MEANINGS:
                with pytest.raises(TypeError, match=r"mask must be of dtype torch.bool or torch.uint8, got"):
                    CRF(K)(emissions, tags, mask, ignored=ignored)
        with pytest.raises(ValueError, match="is on"):
            CRF(K)(emissions, tags.to("meta"))

    def test_trains_along_the_same_curve(self) -> None:
        mask = right_padded([6, 4, 5, 2])
        emissions, tags = batch(mask)
        curves = []
        for crf in twins(batch_first=True):
            encoder = nn.Linear(K, K)
            nn.init.eye_(encoder.weight)
            nn.init.zeros_(encoder.bias)
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
        assert_close(curves[0], curves[1], roundings=20 * 6, scale=curves[1][0].item())


class TestMasks:
    """pytorch-crf #46, #61, #85, #110, #122; AllenNLP #3523; TFA and LightSeq on left padding and holes."""

    @LAYOUTS
    def test_any_mask_agrees_with_brute_force(self, batch_first: bool) -> None:
        crf, _ = twins(batch_first)
        emissions, tags = batch(ANY_MASK)
        f, y, m = laid(batch_first, emissions, tags, ANY_MASK)
        f.requires_grad_()
        loss = crf.nll(f, y, m, "none")
        oracle_f = emissions.clone().requires_grad_()
        oracle = brute_nlls(crf, oracle_f, tags, ANY_MASK)
        assert_close(loss, oracle, 4, NATS)
        wanted = gradients(oracle, crf, oracle_f)
        for name, grad in gradients(loss, crf, f).items():
            expected = wanted[name] if name != "emissions" else laid(batch_first, wanted[name])[0]
            assert_close(grad, expected, 4 * len(ANY_MASK), NATS)

        scores, path = crf.viterbi(f, m)
        decoded = crf.decode(f, m)
        (path,) = laid(batch_first, path)
        for b, live in enumerate(ANY_MASK):
            best, score = max(paths(crf, emissions[b], live), key=lambda each: each[1].item())
            assert tuple(decoded[b]) == best
            assert path[b][live].tolist() == list(best)
            assert (path[b][~live] == -1).all()
            assert_close(scores[b], score, 4, NATS)

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_a_masked_copy_is_the_compacted_sequence(self, data: st.DataObject) -> None:
        live = torch.tensor(data.draw(st.lists(st.booleans(), min_size=1, max_size=8)))
        crf, _ = twins(batch_first=True)
        emissions, tags = batch(live.unsqueeze(0), seed=data.draw(st.integers(0, 99)))
        mask = live.unsqueeze(0)
        short = emissions[:, live], tags[:, live]
        assert torch.equal(crf(emissions, tags, mask), crf(*short))
        assert crf.decode(emissions, mask) == crf.decode(short[0])
        assert torch.equal(crf.marginals(emissions, mask)[:, live], crf.marginals(short[0]))

    def test_the_first_step_may_be_masked(self) -> None:
        """torchcrf: 'mask of the first timestep must all be on'. BERT's [CLS] is masked."""
        ours, peer = twins(batch_first=True)
        mask = torch.tensor([[False, True, True]])
        emissions, tags = batch(mask)
        with pytest.raises(ValueError, match="first timestep"):
            peer(emissions, tags, mask)
        assert torch.equal(ours(emissions, tags, mask), ours(emissions[:, 1:], tags[:, 1:]))

    def test_a_hole_does_not_make_the_likelihood_positive(self) -> None:
        """torchcrf scores transitions into and out of a hole that no path takes: its likelihood can exceed 1."""
        ours, peer = twins(batch_first=True)
        with torch.no_grad():
            for crf in (ours, peer):
                crf.transitions[0].fill_(8)  # out of tag 0, in the hole
                crf.start_transitions[1] = 8  # into tag 1, before it
        mask = torch.tensor([[True, False, True]])
        emissions, tags = torch.zeros(1, 3, K), torch.zeros(1, 3, dtype=torch.long)
        tags[0, 0] = 1
        assert peer(emissions, tags, mask) > 0
        assert_close(ours(emissions, tags, mask), -brute_nlls(ours, emissions, tags, mask)[0], 4, NATS)

    @LAYOUTS
    @pytest.mark.parametrize("ignored", MEANINGS)
    def test_nothing_is_read_where_masked(self, batch_first: bool, ignored: Ignored | None) -> None:
        """pytorch-crf #41, #89, #106, #119: padding labels of -100 are an IndexError, on CUDA a device assert."""
        crf, _ = twins(batch_first)
        emissions, tags = batch(ANY_MASK)
        results = []
        for fill, label in ((0.0, 0), (torch.nan, -100), (torch.inf, 999), (-torch.inf, -(2**40))):
            absent = ~ANY_MASK
            f, y, m = laid(
                batch_first,
                emissions.masked_fill(absent.unsqueeze(2), fill),
                tags.masked_fill(absent, label),
                ANY_MASK,
            )
            f.requires_grad_()
            loss = crf.nll(f, y, m, "none", ignored=ignored)
            grads = gradients(loss, crf, f)
            assert (grads["emissions"][~m] == 0).all()
            marginals = crf.marginals(f, m)
            assert (marginals[~m] == 0).all()
            results.append([loss, *grads.values(), marginals, *crf.viterbi(f, m)])
        for other in results[1:]:
            for x, y in zip(results[0], other, strict=True):
                assert torch.equal(x, y)

    @pytest.mark.parametrize("ignored", MEANINGS)
    def test_nothing_live_at_all(self, ignored: Ignored | None) -> None:
        crf, _ = twins(batch_first=True)
        mask = torch.zeros(2, 3, dtype=torch.bool)
        emissions, tags = batch(mask)
        emissions.requires_grad_()
        for reduction in REDUCTIONS:
            loss = crf.nll(emissions, tags, mask, reduction, ignored=ignored)
            assert (loss == 0).all()
            assert all((grad == 0).all() for grad in gradients(loss, crf, emissions).values())
        assert crf.decode(emissions, mask) == [[], []]

    def test_tag_0_is_a_tag(self) -> None:
        """NCRF++ takes tag 0 for padding, bert4keras a row of -inf."""
        crf, _ = twins(batch_first=True)
        emissions, _ = batch(right_padded([3]))
        tags = torch.zeros(1, 3, dtype=torch.long)
        oracle = brute_nlls(crf, emissions, tags, tags == 0)
        assert_close(crf.nll(emissions, tags, None, "none"), oracle, 4, NATS)

    @pytest.mark.parametrize("shape", [(0, 3, K), (2, 0, K), (2, 1, K), (1, 3, 1), (3, 2, 2), (1, 1, 1)])
    def test_small_shapes(self, shape: tuple[int, int, int]) -> None:
        mask = torch.ones(shape[:2], dtype=torch.bool)
        crf, _ = twins(batch_first=True, num_tags=shape[2])
        emissions, tags = batch(mask, shape[2])
        emissions.requires_grad_()
        loss = crf.nll(emissions, tags, mask, "none")
        if shape[0]:
            assert_close(loss, brute_nlls(crf, emissions, tags, mask), 4, NATS)
        for grad in gradients(loss, crf, emissions).values():
            assert not grad.isnan().any()
        assert [len(row) for row in crf.decode(emissions)] == [shape[1]] * shape[0]
        assert crf.marginals(emissions).shape == shape


class TestIgnoredLabels:
    MASK = right_padded([4, 4, 3, 2])

    def labels(self) -> tuple[Tensor, Tensor]:
        emissions, tags = batch(self.MASK)
        tags[0, 1] = tags[1, 0] = tags[1, 3] = tags[2, 2] = tags[3, 0] = tags[3, 1] = -100
        return emissions, tags

    @LAYOUTS
    def test_minus_100_at_a_live_step_needs_a_meaning(self, batch_first: bool) -> None:
        crf = CRF(K, batch_first)
        emissions, tags, mask = laid(batch_first, *self.labels(), self.MASK)
        for method in (crf, crf.nll):
            with pytest.raises(ValueError, match=r"got -100 for sequence 0, step 1; .* `ignored`"):
                method(emissions, tags, mask)
            for wrong in (None, True):
                with pytest.raises(TypeError, match=f"ignore_index must be an int, got {wrong}"):
                    method(emissions, tags, mask, ignore_index=wrong)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="ignore_index must be a number that a tag can be"):
                method(emissions, tags, mask, ignore_index=2**63, ignored="absent")
            with pytest.raises(ValueError, match="ignored must be None, 'absent' or 'unknown', got 'maybe'"):
                method(emissions, tags, mask, ignored="maybe")  # type: ignore[arg-type]

    @LAYOUTS
    @pytest.mark.parametrize("ignore_index", [-100, 1, 77])
    def test_absent_is_the_mask(self, batch_first: bool, ignore_index: int) -> None:
        crf, _ = twins(batch_first)
        emissions, tags = self.labels()
        tags[tags == -100] = ignore_index
        emissions, tags, mask = laid(batch_first, emissions, tags, self.MASK)
        for reduction in REDUCTIONS:
            for given_mask in (mask, None):
                live = tags != ignore_index if given_mask is None else mask & (tags != ignore_index)
                found = crf.nll(emissions, tags, given_mask, reduction, ignore_index=ignore_index, ignored="absent")
                assert torch.equal(found, crf.nll(emissions, tags, live, reduction))

    @LAYOUTS
    def test_unknown_sums_over_the_tags(self, batch_first: bool) -> None:
        crf, _ = twins(batch_first)
        emissions, tags = self.labels()
        f, y, m = laid(batch_first, emissions, tags, self.MASK)
        f.requires_grad_()
        loss = crf.nll(f, y, m, "none", ignored="unknown")
        oracle_f = emissions.clone().requires_grad_()
        oracle = brute_nlls(crf, oracle_f, tags, self.MASK)
        assert_close(loss, oracle, 4, NATS)
        wanted = gradients(oracle, crf, oracle_f)
        for name, grad in gradients(loss, crf, f).items():
            expected = wanted[name] if name != "emissions" else laid(batch_first, wanted[name])[0]
            assert_close(grad, expected, 4 * len(tags), NATS)
        assert loss[3] == 0  # nothing known: every path agrees
        assert torch.equal(crf(f, y, m, "none", ignored="unknown"), -loss)
        counts = crf.nll(f, y, m, "sum", ignored="unknown") / crf.nll(f, y, m, "token_mean", ignored="unknown")
        assert_close(counts, self.MASK.sum(), 2, float(self.MASK.sum()))  # an unknown step is live

    @pytest.mark.parametrize("ignored", ["absent", "unknown"])
    def test_both_differentiate_exactly(self, ignored: Ignored) -> None:
        crf, _ = twins(batch_first=True, dtype=torch.float64)
        emissions, tags = self.labels()

        def loss(f: Tensor, *parameters: Tensor) -> Tensor:
            named = dict(zip(dict(crf.named_parameters()), parameters, strict=True))
            value: Tensor = torch.func.functional_call(crf, named, (f, tags, self.MASK, "none"), {"ignored": ignored})
            return value

        inputs = (emissions.double().requires_grad_(), *(p.detach().requires_grad_() for p in crf.parameters()))
        assert torch.autograd.gradcheck(loss, inputs)

    @pytest.mark.parametrize("ignored", ["absent", "unknown"])
    def test_all_known_is_the_plain_loss(self, ignored: Ignored) -> None:
        crf, _ = twins(batch_first=True)
        emissions, tags = batch(ANY_MASK)
        emissions.requires_grad_()
        plain = crf.nll(emissions, tags, ANY_MASK, "none")
        loss = crf.nll(emissions, tags, ANY_MASK, "none", ignored=ignored)
        assert_close(loss, plain, 4, NATS)
        wanted = gradients(plain, crf, emissions)
        for name, grad in gradients(loss, crf, emissions).items():
            assert_close(grad, wanted[name], 4 * len(tags), NATS)

    @pytest.mark.parametrize("ignored", ["absent", "unknown"])
    def test_another_label_out_of_range_still_raises(self, ignored: Ignored) -> None:
        emissions, tags = self.labels()
        tags[2, 0] = K
        with pytest.raises(ValueError, match=rf"got {K} for sequence 2, step 0"):
            CRF(K, batch_first=True).nll(emissions, tags, self.MASK, ignored=ignored)

    def test_unknown_under_constraints(self) -> None:
        """A forbidden tag next to an unknown one: +inf and no gradient for that sequence alone."""
        crf, _ = twins(batch_first=True)
        mask = torch.ones(2, 3, dtype=torch.bool)
        emissions, _ = batch(mask)
        tags = torch.tensor([[0, -100, 1], [0, -100, 2]])
        emissions[0, 2, 1] = -torch.inf
        emissions.requires_grad_()
        loss = crf.nll(emissions, tags, mask, "none", ignored="unknown")
        assert loss[0] == torch.inf
        assert loss[1].isfinite()
        grads = gradients(loss, crf, emissions)
        assert (grads["emissions"][0] == 0).all()
        alone = emissions.detach()[1:].requires_grad_()
        wanted = gradients(crf.nll(alone, tags[1:], None, "none", ignored="unknown"), crf, alone)
        assert torch.equal(grads["emissions"][1:], wanted["emissions"])
        assert torch.equal(grads["transitions"], wanted["transitions"])

    def test_rounding_does_not_make_a_loss_negative(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The two log Z are rounded apart; here the smaller set of paths comes out one rounding above all paths."""
        values = iter([5.0, 5.0 * (1 + torch.finfo(torch.float32).eps)])
        monkeypatch.setattr(ops, "crf_log_partition", lambda f, *rest: f.new_full((2,), next(values)))
        emissions, tags = batch(torch.ones(2, 3))
        loss = CRF(K, batch_first=True).nll(emissions, tags, None, "none", ignored="unknown")
        assert (loss == 0).all()

    def test_unknown_is_never_negative(self) -> None:
        crf, _ = twins(batch_first=True)
        emissions, _ = batch(torch.ones(200, 12))
        emissions = 10 * emissions
        _, tags = crf.viterbi(emissions)  # the loss is nearly 0
        tags[:, ::2] = -100
        assert (crf.nll(emissions, tags, None, "none", ignored="unknown") >= 0).all()


class TestValues:
    def test_nll_is_the_negative_with_mean_as_default(self) -> None:
        """pytorch-crf #81: a log-likelihood that is taken for a loss."""
        crf, _ = twins(batch_first=True)
        emissions, tags = batch(ANY_MASK)
        for reduction in REDUCTIONS:
            loss = crf.nll(emissions, tags, ANY_MASK, reduction)
            assert torch.equal(loss, -crf(emissions, tags, ANY_MASK, reduction))
            assert (loss >= 0).all()
        each = crf.nll(emissions, tags, ANY_MASK, "none").double()
        divisors: dict[Reduction, int] = {"sum": 1, "mean": 5, "token_mean": 10}
        for reduction, divisor in divisors.items():
            wanted = each.sum() / divisor
            assert_close(crf.nll(emissions, tags, ANY_MASK, reduction), wanted, 5, wanted.item())
        assert torch.equal(crf.nll(emissions, tags, ANY_MASK), crf.nll(emissions, tags, ANY_MASK, "mean"))
        assert torch.equal(crf.nll(emissions[:1], tags[:1]), crf.nll(emissions[:1], tags[:1], None, "sum"))

    def test_probabilities_of_all_paths_sum_to_1(self) -> None:
        """flash-semicrf's sum to 0.378."""
        crf, _ = twins(batch_first=True)
        emissions, _ = batch(right_padded([3]))
        every = torch.tensor(list(itertools.product(range(K), repeat=3)))
        total = crf(emissions.expand(len(every), -1, -1), every, reduction="none").exp().sum()
        assert_close(total, torch.tensor(1.0), 4, NATS)

    @LAYOUTS
    def test_viterbi_scores_its_path(self, batch_first: bool) -> None:
        crf, _ = twins(batch_first)
        f, m = laid(batch_first, batch(ANY_MASK)[0], ANY_MASK)
        scores, path = crf.viterbi(f, m)
        assert path.shape == m.shape
        assert torch.equal(path == -1, ~m)
        chain = [x if batch_first else x.transpose(0, 1) for x in (f, path, m)]
        rescored = ops.crf_score(
            chain[0], crf.transitions, chain[1], crf.start_transitions, crf.end_transitions, chain[2]
        )
        assert_close(scores, rescored, 4, NATS)
        # a path of the module is a `tags` of the module
        assert (crf.nll(f, path, m, "none") <= crf.nll(f, torch.zeros_like(path), m, "none")).all()

    @LAYOUTS
    def test_marginals_agree_with_brute_force(self, batch_first: bool) -> None:
        """flair #3070 calls a softmax of prefix scores a confidence."""
        crf, _ = twins(batch_first)
        emissions, _ = batch(ANY_MASK)
        f, m = laid(batch_first, emissions, ANY_MASK)
        found = crf.marginals(f, m)
        assert found.shape == f.shape
        (found,) = laid(batch_first, found.detach())
        for b, live in enumerate(ANY_MASK):
            scored = list(paths(crf, emissions[b], live))
            weights = torch.stack([score for _, score in scored]).softmax(0)
            oracle = torch.zeros(int(live.sum()), K, dtype=torch.float64)
            for (path, _), weight in zip(scored, weights, strict=True):
                for k, tag in enumerate(path):
                    oracle[k, tag] += weight.detach()
            assert_close(found[b][live], oracle, 4, NATS)
            assert_close(found[b][live].sum(1), torch.ones(len(oracle)), K)

    def test_marginals_differentiate(self) -> None:
        crf, _ = twins(dtype=torch.float64)
        emissions = batch(ANY_MASK)[0].double().transpose(0, 1).requires_grad_()
        assert torch.autograd.gradcheck(lambda f: crf.marginals(f, ANY_MASK.T), emissions)

    @LAYOUTS
    def test_forbidden_gold(self, batch_first: bool) -> None:
        """pytorch-crf: one -inf transition makes NaN gradients; an infeasible lattice a NaN loss for the batch."""
        crf, _ = twins(batch_first)
        with torch.no_grad():
            crf.transitions[0, 1] = -torch.inf
        tags = torch.tensor([[0, 1, 2], [0, 2, 1]])
        mask = torch.ones(2, 3, dtype=torch.bool)
        f, y, m = laid(batch_first, batch(mask)[0], tags, mask)
        f.requires_grad_()
        value = crf(f, y, m, "none")
        assert value[0] == -torch.inf
        assert value[1].isfinite()
        assert crf(f, y, m) == -torch.inf
        grads = gradients(value, crf, f)
        by_row = laid(batch_first, grads["emissions"])[0]
        assert (by_row[0] == 0).all()
        assert (by_row[1] != 0).any()
        assert grads["transitions"][0, 1] == 0
        assert all(grad.isfinite().all() for grad in grads.values())

    def test_no_path_at_all(self) -> None:
        crf, _ = twins(batch_first=True)
        mask = torch.ones(2, 3, dtype=torch.bool)
        emissions, tags = batch(mask)
        emissions[0, 1] = -torch.inf
        emissions.requires_grad_()
        for ignored in MEANINGS:
            loss = crf.nll(emissions, tags, mask, "none", ignored=ignored)
            assert loss[0] == torch.inf
            assert loss[1].isfinite()
            grads = gradients(loss, crf, emissions)
            assert (grads["emissions"][0] == 0).all()
            assert all(grad.isfinite().all() for grad in grads.values())
        assert crf.decode(emissions)[0] == [-1, -1, -1]
        assert crf.decode(emissions, mask) == crf.decode(emissions)
        assert (crf.marginals(emissions)[0] == 0).all()

    def test_same_input_same_bits(self) -> None:
        crf, _ = twins()
        emissions, tags = batch(right_padded([20] * 9))
        emissions.requires_grad_()
        first, second = (gradients(crf(emissions, tags), crf, emissions) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("module_too", [False, True])
    @LAYOUTS
    def test_half_emissions_are_summed_in_float32(
        self, dtype: torch.dtype, module_too: bool, batch_first: bool
    ) -> None:
        """pytorch-crf in bfloat16 at T=512: 18 % off. Only the inputs are rounded here."""
        crf, _ = twins(batch_first, num_tags=9)
        crf = crf.to(dtype if module_too else torch.float32)
        emissions, tags = batch(torch.ones(2, 512), num_tags=9)
        f, y = laid(batch_first, emissions.to(dtype), tags)
        f.requires_grad_()
        value = crf(f, y)
        assert value.dtype == torch.float32
        exact = copy.deepcopy(crf).double()
        assert_close(value, exact(f.double(), y), 4, abs(value.item()))
        value.backward()
        assert f.grad is not None
        assert f.grad.dtype == dtype
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in crf.parameters())
        assert crf.marginals(f).dtype == crf.viterbi(f)[0].dtype == torch.float32
        assert len(crf.decode(f)) == 2

    def test_float64_on_either_side(self) -> None:
        emissions, tags = batch(torch.ones(3, 5))
        single, _ = twins(batch_first=True)
        double = copy.deepcopy(single).double()
        value = double(emissions.double(), tags)
        assert value.dtype == torch.float64
        for mixed in (double(emissions, tags), single(emissions.double(), tags)):
            assert mixed.dtype == torch.float64
            assert_close(mixed, value, 4, abs(value.item()))

    def test_autocast(self) -> None:
        crf, _ = twins(batch_first=True)
        encoder = nn.Linear(8, K)
        x, tags = torch.randn(3, 5, 8), batch(torch.ones(3, 5))[1]
        with torch.autocast("cpu", torch.bfloat16):
            emissions = encoder(x)
            loss = crf.nll(emissions, tags)
            assert emissions.dtype == torch.bfloat16
            assert loss.dtype == torch.float32
        assert torch.equal(loss, crf.nll(emissions, tags))
        loss.backward()
        assert encoder.weight.grad is not None
        assert crf.transitions.grad is not None


class TestCost:
    @LAYOUTS
    @pytest.mark.parametrize("reduction", ["sum", "mean", "token_mean"])
    def test_one_sweep_over_views(
        self, batch_first: bool, reduction: Reduction, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Backward repeats no sweep; emissions, tags and mask are never copied on their way to the op."""
        seen: list[int] = []
        statuses: list[int] = []
        crf_nll = ops.crf_nll

        def spy(emissions: Tensor, transitions: Tensor, tags: Tensor, *rest: Tensor, **options: Any) -> Tensor:
            seen.extend([emissions.data_ptr(), tags.data_ptr(), rest[2].data_ptr()])
            assert emissions.stride(2) == 1
            return crf_nll(emissions, transitions, tags, *rest, **options)

        def counted(launch: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: (statuses.append(launch(*args)), statuses[-1])[1]  # type: ignore[func-returns-value]

        monkeypatch.setattr(ops, "crf_nll", spy)
        emissions, tags, mask = laid(batch_first, *batch(ANY_MASK), ANY_MASK)
        emissions.requires_grad_()
        crf = CRF(K, batch_first)
        with launches("chain", pyseq.explain(ops.viterbi, emissions).chosen, counted):
            for method in (crf, crf.nll):
                method(emissions, tags, mask, reduction).backward()
        assert statuses.count(OK) == 2
        assert set(statuses) <= {OK, UNFIT}
        assert seen == 2 * [emissions.data_ptr(), tags.data_ptr(), mask.data_ptr()]

    def test_inputs_are_left_alone(self) -> None:
        """torch-struct sets requires_grad on the caller's tensor; torbi exponentiates it in place."""
        crf, _ = twins(batch_first=True)
        inputs = (*batch(ANY_MASK), ANY_MASK.clone())
        before = [(x.clone(), x._version, x.requires_grad) for x in inputs]
        emissions, tags, mask = inputs
        for ignored in MEANINGS:
            crf.nll(emissions, tags, mask, ignored=ignored).backward()
        crf.decode(emissions, mask)
        crf.viterbi(emissions, mask)
        crf.marginals(emissions, mask).sum().backward()
        for x, (value, version, required) in zip(inputs, before, strict=True):
            assert torch.equal(x, value)
            assert (x._version, x.requires_grad) == (version, required)

    def test_strided_emissions(self) -> None:
        crf, _ = twins(batch_first=True)
        wide, tags = torch.randn(3, 10, 2 * K), batch(torch.ones(3, 5))[1]
        for view in (wide[:, ::2, :K], wide[:, ::2, ::2], wide[:1, ::2, :K].expand(3, -1, -1)):
            assert torch.equal(crf(view, tags), crf(view.contiguous(), tags))


class Tagger(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, K)
        self.crf = CRF(K, batch_first)

    def forward(self, x: Tensor, tags: Tensor, mask: Tensor | None, ignored: Ignored | None = None) -> Tensor:
        log_likelihood: Tensor = self.crf(self.encoder(x), tags, mask, reduction="mean", ignored=ignored)
        return -log_likelihood


class TestTorch:
    @LAYOUTS
    @INSTANTIATED
    @pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.uint8])
    @pytest.mark.parametrize("ignored", MEANINGS)
    def test_compile_fullgraph(
        self, batch_first: bool, mask_dtype: torch.dtype | None, ignored: Ignored | None
    ) -> None:
        """torchcrf: a uint8 mask breaks the graph, a bool mask meets a data-dependent check."""
        torch._dynamo.reset()
        model = Tagger(batch_first)
        x, tags, mask = laid(batch_first, torch.randn(*ANY_MASK.shape, 6), batch(ANY_MASK)[1], ANY_MASK)
        given_mask = None if mask_dtype is None else mask.to(mask_dtype)
        wanted = model(x, tags, given_mask, ignored)
        wanted_grads = torch.autograd.grad(wanted, list(model.parameters()))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss = compiled(x, tags, given_mask, ignored)
        assert_close(loss, wanted, 4, NATS)
        for grad, expected in zip(torch.autograd.grad(loss, list(model.parameters())), wanted_grads, strict=True):
            assert_close(grad, expected, 4, NATS)

    @INSTANTIATED
    @pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, on importing inductor
    @pytest.mark.slow
    def test_compile_inductor(self) -> None:
        torch._dynamo.reset()
        model = Tagger()
        x, tags = torch.randn(*ANY_MASK.shape, 6), batch(ANY_MASK)[1]
        loss = torch.compile(model, fullgraph=True)(x, tags, ANY_MASK)
        assert_close(loss, model(x, tags, ANY_MASK), 4, NATS)
        loss.backward()
        assert model.crf.transitions.grad is not None

    def test_copies_and_pickles(self) -> None:
        model = Tagger()
        x, tags = torch.randn(*ANY_MASK.shape, 6), batch(ANY_MASK)[1]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x, tags, ANY_MASK), model(x, tags, ANY_MASK))
            assert twin.crf.transitions is not model.crf.transitions
            assert repr(twin) == repr(model)

    def test_replicas_for_data_parallel(self) -> None:
        """DataParallel puts plain tensors for a shallow copy's parameters; pytorch-crf #31 cannot gather lists."""
        crf, _ = twins(batch_first=True)
        emissions, tags = batch(ANY_MASK)
        replica = crf._replicate_for_data_parallel()
        for name, parameter in crf.named_parameters():
            setattr(replica, name, parameter * 1)
        loss = replica(emissions, tags, ANY_MASK, reduction="none")
        assert torch.equal(loss, crf(emissions, tags, ANY_MASK, reduction="none"))
        loss.sum().backward()
        assert crf.transitions.grad is not None
        assert all(x.size(0) == len(tags) for x in replica.viterbi(emissions, ANY_MASK))
        assert torch.equal(nn.DataParallel(crf)(emissions, tags, ANY_MASK), crf(emissions, tags, ANY_MASK))

    def test_vmap_says_why_not(self) -> None:
        crf, _ = twins(batch_first=True)
        emissions, tags = batch(ANY_MASK)
        with pytest.raises((RuntimeError, NotImplementedError), match="vmap"):
            torch.func.vmap(crf)(emissions.unsqueeze(0), tags.unsqueeze(0))

    def test_second_derivatives(self) -> None:
        crf, _ = twins(batch_first=True, dtype=torch.float64)
        emissions, tags = batch(right_padded([3, 2]))
        f = emissions.double().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda f: crf.nll(f, tags, right_padded([3, 2])), f)


class TestParameterGroups:
    def test_every_trained_parameter_once(self) -> None:
        model = Tagger()
        model.again = model.crf  # type: ignore[assignment]
        model.second = CRF(2)  # type: ignore[assignment]
        model.second.transitions = model.crf.transitions  # type: ignore[assignment]
        model.encoder.bias.requires_grad_(False)
        model.crf.end_transitions.requires_grad_(False)
        rest, heads = crf_parameter_groups(model, lr=1e-5, multiplier=50.0)
        assert (rest["lr"], heads["lr"]) == (1e-5, 1e-5 * 50)
        assert [id(p) for p in rest["params"]] == [id(model.encoder.weight)]
        wanted = {id(p) for crf in (model.crf, model.second) for p in crf.parameters() if p.requires_grad}
        found = [id(p) for p in heads["params"]]
        assert set(found) == wanted
        assert len(found) == len(wanted) == 4
        assert id(model.crf.end_transitions) not in found

    def test_a_tied_parameter_belongs_to_the_crf(self) -> None:
        model = Tagger()
        model.tied = nn.Linear(K, K)  # type: ignore[assignment]
        model.tied.weight = model.crf.transitions
        rest, heads = crf_parameter_groups(model, 1e-3)
        assert id(model.crf.transitions) in {id(p) for p in heads["params"]}
        assert id(model.crf.transitions) not in {id(p) for p in rest["params"]}

    def test_a_subclass_with_its_own_encoder(self) -> None:
        class Everything(CRF):
            def __init__(self) -> None:
                super().__init__(K)
                self.encoder = nn.Linear(6, K)

        model = Everything()
        rest, heads = crf_parameter_groups(model, 1e-3)
        assert [id(p) for p in rest["params"]] == [id(p) for p in model.encoder.parameters()]
        assert len(heads["params"]) == 3

    def test_empty_groups_are_left_out(self) -> None:
        crf = CRF(K)
        (heads,) = crf_parameter_groups(crf, 1e-5)
        assert heads["lr"] == 1e-5 * 100
        assert [id(p) for p in heads["params"]] == [id(p) for p in crf.parameters()]
        model = Tagger()
        model.crf.requires_grad_(False)
        (rest,) = crf_parameter_groups(model, 1e-5)
        assert rest["lr"] == 1e-5

    def test_a_model_without_a_crf(self) -> None:
        with pytest.raises(ValueError, match=re.escape("Linear contains no pyseq.nn.CRF")):
            crf_parameter_groups(nn.Linear(2, 2), 1e-5)
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not its parameters, got generator"):
            crf_parameter_groups(nn.Linear(2, 2).parameters(), 1e-5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="lr must be a number, got 'a'"):
            crf_parameter_groups(CRF(2), "a")  # type: ignore[arg-type]

    @pytest.mark.parametrize("num_tags", ["4", 4.0, True, None, torch.tensor(3.0)])
    def test_num_tags_must_be_an_integer(self, num_tags: int) -> None:
        with pytest.raises(TypeError, match=re.escape(f"num_tags must be an integer, got {num_tags!r}")):
            CRF(num_tags)
        assert type(CRF(torch.tensor(3)).num_tags) is int  # type: ignore[arg-type]

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
    def test_one_step_of_an_optimizer(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        """The CRF's first step is exactly `multiplier` times that under a single rate, the encoder's is the same."""
        x, tags = torch.randn(*ANY_MASK.shape, 6), batch(ANY_MASK)[1]
        torch.manual_seed(0)
        first = Tagger().double()
        second = copy.deepcopy(first)
        moves = []
        for model, groups in ((first, first.parameters()), (second, crf_parameter_groups(second, 1e-4, 100.0))):
            before = [p.detach().clone() for p in model.parameters()]
            chosen = optimizer(groups, lr=1e-4, weight_decay=0.0)
            model(x.double(), tags, ANY_MASK).backward()
            chosen.step()
            moves.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
        names = [name for name, _ in first.named_parameters()]
        for name, plain, scaled in zip(names, *moves, strict=True):
            factor = 100 if name.startswith("crf.") else 1
            assert_close(scaled, factor * plain, 4 * 100)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")  # torch, of its prototype
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, K), torch.randn(4, K)], layout=layout)
    with pytest.raises(TypeError, match="emissions must be a dense tensor, got a nested one; use padding and a mask"):
        CRF(K, batch_first=True).decode(nested)


@LAYOUTS
@pytest.mark.parametrize(
    ("name", "bad"),
    [("emissions", [[[0.0]]]), ("emissions", None), ("tags", [[0]]), ("tags", None), ("mask", [[True]])],
)
def test_what_is_no_tensor_is_named(name: str, bad: object, batch_first: bool) -> None:
    given: dict[str, object] = {"emissions": torch.zeros(1, 1, 1), "tags": torch.zeros(1, 1, dtype=torch.int64)}
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got {type(bad).__name__}"):
        CRF(1, batch_first).nll(**{**given, name: bad})  # type: ignore[arg-type]
