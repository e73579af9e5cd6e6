"""nn.CRF against brute force over all paths. What pytorch-crf says to the same calls is in test_crf_drop_in.py."""

import copy
import inspect
import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pyseq
from pyseq import ops
from pyseq.kernels import OK, UNFIT
from pyseq.nn import CRF, crf_parameter_groups
from pyseq.nn.crf import Ignored, Reduction
from pyseq.testing import launches

ROOM = "chain"
K = 4
NATS = 20.0  # path scores and log Z of the small problems here are below this
REDUCTIONS: list[Reduction] = ["none", "sum", "mean", "token_mean"]
MEANINGS: list[Ignored | None] = [None, "absent", "unknown"]
FIRST_TWO = "the first two dimensions of emissions and"
LAYOUTS = pytest.mark.parametrize("batch_first", [False, True])
# every meaning in one layout, each layout at least once
LAID_MEANINGS = pytest.mark.parametrize(
    ("batch_first", "ignored"), [(False, None), (True, None), (False, "absent"), (True, "unknown")]
)
# (B, T) = (5, 4): right and left padding, holes, a masked first step, nothing live
ANY_MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)


def made(batch_first: bool = True, dtype: torch.dtype = torch.float32, num_tags: int = K) -> CRF:
    """With parameters of the size of the emissions."""
    torch.manual_seed(3)
    crf = CRF(num_tags, batch_first)
    for parameter in crf.parameters():
        nn.init.normal_(parameter)
    return crf.to(dtype)


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
        score = rows[:0].sum()
        for k, tag in enumerate(path):
            score = score + rows[k, tag] + (transitions[path[k - 1], tag] if k else start[tag])
        yield path, score + end[path[-1]] if path else score


def brute_nll(crf: CRF, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
    """(B,): log Z minus log Z over the paths that agree with the tags; -100 at a live step stands for any tag."""
    losses = []
    for f, y, live in zip(emissions, tags, mask, strict=True):
        scored, gold = list(paths(crf, f, live)), y[live].tolist()
        agreeing = [s for path, s in scored if all(tag in (a, -100) for a, tag in zip(path, gold, strict=True))]
        losses.append(torch.stack([s for _, s in scored]).logsumexp(0) - torch.stack(agreeing).logsumexp(0))
    return torch.stack(losses)


def gradients(value: Tensor, crf: nn.Module, emissions: Tensor) -> dict[str, Tensor]:
    named = {"emissions": emissions, **dict(crf.named_parameters())}
    found = torch.autograd.grad(value.sum(), list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def assert_close(found: Tensor, oracle: Tensor, roundings: int, scale: float = NATS) -> None:
    """Within so many roundings of numbers of the size `scale`, in the precision of `found`."""
    assert found.shape == oracle.shape
    found, oracle = found.detach(), oracle.detach()
    budget = roundings * torch.finfo(found.dtype).eps * max(scale, 1.0)
    torch.testing.assert_close(found.double(), oracle.double(), rtol=0, atol=budget)


def assert_right(crf: CRF, emissions: Tensor, tags: Tensor, mask: Tensor, ignored: Ignored | None = None) -> Tensor:
    """The losses, after they and their gradients agree with brute force; arguments with the batch first."""
    f, y, m = laid(crf.batch_first, emissions, tags, mask)
    loss = crf.nll(f.requires_grad_(), y, m, "none", ignored=ignored)
    oracle_f = emissions.detach().clone().requires_grad_()
    oracle = brute_nll(crf, oracle_f, tags, mask)
    assert_close(loss, oracle, 4)
    wanted = gradients(oracle, crf, oracle_f)
    for name, grad in gradients(loss, crf, f).items():
        assert_close(laid(crf.batch_first, grad)[0] if name == "emissions" else grad, wanted[name], 4 * len(tags))
    return loss


class TestArguments:
    def test_parameters(self) -> None:
        torch.manual_seed(7)
        crf = CRF(5, batch_first=True)
        assert repr(crf) == "CRF(num_tags=5)"
        assert (crf.num_tags, crf.batch_first) == (5, True)
        assert str(inspect.signature(CRF)) == "(num_tags: int, batch_first: bool = False) -> None"
        for method, wanted in (("forward", "self emissions tags mask reduction"), ("decode", "self emissions mask")):
            parameters = inspect.signature(getattr(CRF, method)).parameters
            assert " ".join(name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY) == wanted
        shapes = {name: tuple(x.shape) for name, x in crf.state_dict().items()}
        assert shapes == {"start_transitions": (5,), "end_transitions": (5,), "transitions": (5, 5)}
        before = copy.deepcopy(crf.state_dict())
        nn.init.constant_(crf.transitions, 9)
        torch.manual_seed(7)
        crf.reset_parameters()
        for name, x in crf.named_parameters():
            assert torch.equal(x, before[name])
            assert 0 < x.abs().max() <= 0.1

    @pytest.mark.parametrize("num_tags", ["4", 4.0, True, None, torch.tensor(3.0)])
    def test_num_tags_must_be_an_integer(self, num_tags: int) -> None:
        with pytest.raises(TypeError, match=re.escape(f"num_tags must be an integer, got {num_tags!r}")):
            CRF(num_tags)
        assert type(CRF(torch.tensor(3)).num_tags) is int  # type: ignore[arg-type]
        for number in (0, -1):
            with pytest.raises(ValueError, match=f"^invalid number of tags: {number}$"):
                CRF(number)

    @LAYOUTS
    @pytest.mark.parametrize(
        ("emissions", "tags", "mask", "message"),
        [
            ((2, 4), (2, 2), (1, 1), "emissions must have dimension of 3, got 2"),
            ((3, 2, 3), (2, 2), (1, 1), "expected last dimension of emissions is 4, got 3"),
            ((3, 2, 4), (2, 2), (1, 1), f"{FIRST_TWO} tags must match, got (3, 2) and (2, 2)"),
            ((3, 2, 4), (2, 3), None, f"{FIRST_TWO} tags must match, got (3, 2) and (2, 3)"),
            ((3, 2, 4), (3,), None, f"{FIRST_TWO} tags must match, got (3, 2) and (3,)"),
            ((3, 2, 4), (3, 2), (2, 2), f"{FIRST_TWO} mask must match, got (3, 2) and (2, 2)"),
            ((3, 2, 4), (3, 2), (3, 2), "invalid reduction: total"),
        ],
    )
    def test_words_of_pytorch_crf(self, emissions: Any, tags: Any, mask: Any, message: str, batch_first: bool) -> None:
        """The first fault speaks, and shapes before values: masks have their first step off, tags are out of range."""
        crf, f, y = CRF(4, batch_first), torch.zeros(emissions), torch.full(tags, 99)
        m = None if mask is None else torch.zeros(mask, dtype=torch.bool)
        for method in (crf, crf.nll):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                method(f, y, m, "total")  # type: ignore[arg-type]
        if "tags must" not in message and "reduction" not in message:
            for name in ("decode", "viterbi", "marginals"):
                with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                    getattr(crf, name)(f, m)

    def test_dtypes_that_no_op_serves(self) -> None:
        emissions, tags = torch.zeros(3, 2, K), torch.zeros(3, 2, dtype=torch.long)
        with pytest.raises(TypeError, match=r"emissions must be of dtype .*, got torch.int64"):
            CRF(K)(emissions.long(), tags)
        with pytest.raises(TypeError, match=r"tags must be of dtype .*, got torch.float32"):
            CRF(K)(emissions, tags.float())
        for mask, ignored in itertools.product((torch.ones(3, 2), torch.ones(3, 2, dtype=torch.long)), MEANINGS):
            with pytest.raises(TypeError, match=r"mask must be of dtype torch.bool or torch.uint8, got"):
                CRF(K)(emissions, tags, mask, ignored=ignored)
        with pytest.raises(ValueError, match="is on"):
            CRF(K)(emissions, tags.to("meta"))

    @pytest.mark.parametrize(
        ("name", "bad"),
        [("emissions", [[[0.0]]]), ("emissions", None), ("tags", [[0]]), ("tags", None), ("mask", [[True]])],
    )
    def test_what_is_no_tensor_is_named(self, name: str, bad: object) -> None:
        good: dict[str, object] = {"emissions": torch.zeros(1, 1, 1), "tags": torch.zeros(1, 1, dtype=torch.int64)}
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got {type(bad).__name__}"):
            CRF(1).nll(**{**good, name: bad})  # type: ignore[arg-type]

    @pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")  # torch, of its prototype
    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
    def test_nested_tensors_are_refused(self, layout: torch.layout) -> None:
        nested = torch.nested.nested_tensor([torch.randn(3, K), torch.randn(4, K)], layout=layout)
        with pytest.raises(TypeError, match="emissions must be a dense tensor, got a nested one; use padding and a ma"):
            CRF(K, batch_first=True).decode(nested)


class TestMasks:
    """pytorch-crf #46, #61, #85, #110, #122; AllenNLP #3523; TFA and LightSeq on left padding and holes."""

    @LAYOUTS
    def test_any_mask_agrees_with_brute_force(self, batch_first: bool) -> None:
        crf = made(batch_first)
        emissions, tags = batch(ANY_MASK)
        assert_right(crf, emissions, tags, ANY_MASK)
        f, m = laid(batch_first, emissions, ANY_MASK)
        scores, path = crf.viterbi(f, m)
        decoded, marginals = crf.decode(f, m), crf.marginals(f, m)
        assert (path.shape, marginals.shape) == (m.shape, f.shape)
        path, marginals = laid(batch_first, path, marginals)
        assert torch.equal(path == -1, ~ANY_MASK)
        for b, live in enumerate(ANY_MASK):
            scored = list(paths(crf, emissions[b], live))
            best, score = max(scored, key=lambda each: each[1].item())
            assert tuple(decoded[b]) == best
            assert path[b][live].tolist() == list(best)
            assert_close(scores[b], score, 4)
            posteriors = torch.zeros(int(live.sum()), K, dtype=torch.float64)
            weights = torch.stack([score for _, score in scored]).softmax(0).detach()
            for (tags_of_path, _), weight in zip(scored, weights, strict=True):
                posteriors[range(len(tags_of_path)), tags_of_path] += weight
            assert_close(marginals[b][live], posteriors, 4)

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_a_masked_copy_is_the_compacted_sequence(self, data: st.DataObject) -> None:
        live = torch.tensor(data.draw(st.lists(st.booleans(), min_size=1, max_size=8)))
        crf, mask = made(), live.unsqueeze(0)
        emissions, tags = batch(mask, seed=data.draw(st.integers(0, 99)))
        short = emissions[:, live], tags[:, live]
        assert torch.equal(crf(emissions, tags, mask), crf(*short))
        assert crf.decode(emissions, mask) == crf.decode(short[0])
        assert torch.equal(crf.marginals(emissions, mask)[:, live], crf.marginals(short[0]))

    @LAYOUTS
    def test_uint8_masks_are_bool_masks(self, batch_first: bool) -> None:
        crf = made(batch_first)
        emissions, tags, mask = laid(batch_first, *batch(ANY_MASK), ANY_MASK)
        byte = mask.to(torch.uint8) * 255
        for ignored in MEANINGS:
            assert torch.equal(crf(emissions, tags, byte, ignored=ignored), crf(emissions, tags, mask, ignored=ignored))
        assert crf.decode(emissions, byte) == crf.decode(emissions, mask)
        for found, wanted in zip(crf.viterbi(emissions, byte), crf.viterbi(emissions, mask), strict=True):
            assert torch.equal(found, wanted)
        assert torch.equal(crf.marginals(emissions, byte), crf.marginals(emissions, mask))

    @LAID_MEANINGS
    def test_nothing_is_read_where_masked(self, batch_first: bool, ignored: Ignored | None) -> None:
        """pytorch-crf #41, #89, #106, #119: padding labels of -100 are an IndexError, on CUDA a device assert."""
        crf, absent = made(batch_first), ~ANY_MASK
        emissions, tags = batch(ANY_MASK)
        results = []
        for fill, label in ((0.0, 0), (torch.nan, -100), (torch.inf, 999), (-torch.inf, -(2**40))):
            filled = emissions.masked_fill(absent.unsqueeze(2), fill), tags.masked_fill(absent, label)
            f, y, m = laid(batch_first, *filled, ANY_MASK)
            loss = crf.nll(f.requires_grad_(), y, m, "none", ignored=ignored)
            grads, marginals = gradients(loss, crf, f), crf.marginals(f, m)
            assert (grads["emissions"][~m] == 0).all()
            assert (marginals[~m] == 0).all()
            results.append([loss, *grads.values(), marginals, *crf.viterbi(f, m)])
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))

    @pytest.mark.parametrize("ignored", MEANINGS)
    def test_nothing_live_at_all(self, ignored: Ignored | None) -> None:
        crf, mask = made(), torch.zeros(2, 3, dtype=torch.bool)
        emissions, tags = batch(mask)
        emissions.requires_grad_()
        for reduction in REDUCTIONS:
            loss = crf.nll(emissions, tags, mask, reduction, ignored=ignored)
            assert (loss == 0).all()
            assert all((grad == 0).all() for grad in gradients(loss, crf, emissions).values())
        assert crf.decode(emissions, mask) == [[], []]

    @pytest.mark.parametrize("shape", [(0, 3, K), (2, 0, K), (2, 1, K), (1, 3, 1), (3, 2, 2), (1, 1, 1)])
    def test_small_shapes(self, shape: tuple[int, int, int]) -> None:
        mask, crf = torch.ones(shape[:2], dtype=torch.bool), made(num_tags=shape[2])
        emissions, tags = batch(mask, shape[2])
        if shape[0]:
            assert_right(crf, emissions, tags, mask)
        assert crf.nll(emissions, tags, mask, "none").shape == shape[:1]
        assert [len(row) for row in crf.decode(emissions)] == [shape[1]] * shape[0]
        assert crf.marginals(emissions).shape == shape


class TestIgnoredLabels:
    MASK = torch.arange(4) < torch.tensor([[4], [4], [3], [2]])

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

    @pytest.mark.parametrize(("batch_first", "ignore_index"), [(False, -100), (True, 1), (False, 77)])
    def test_absent_is_the_mask(self, batch_first: bool, ignore_index: int) -> None:
        crf = made(batch_first)
        emissions, tags = self.labels()
        emissions, tags, mask = laid(batch_first, emissions, tags.where(tags != -100, ignore_index), self.MASK)
        for reduction, given_mask in itertools.product(REDUCTIONS, (mask, None)):
            live = tags != ignore_index if given_mask is None else mask & (tags != ignore_index)
            found = crf.nll(emissions, tags, given_mask, reduction, ignore_index=ignore_index, ignored="absent")
            assert torch.equal(found, crf.nll(emissions, tags, live, reduction))

    @LAYOUTS
    def test_unknown_sums_over_the_tags(self, batch_first: bool) -> None:
        crf, (emissions, tags) = made(batch_first), self.labels()
        loss = assert_right(crf, emissions, tags, self.MASK, "unknown")
        assert loss[3] == 0  # nothing known: every path agrees
        f, y, m = laid(batch_first, emissions, tags, self.MASK)
        assert torch.equal(crf(f, y, m, "none", ignored="unknown"), -loss)
        # an unknown step is live
        divisors: dict[Reduction, Tensor | int] = {"sum": 1, "mean": 4, "token_mean": self.MASK.sum()}
        for reduction, divisor in divisors.items():
            assert_close(crf.nll(f, y, m, reduction, ignored="unknown"), loss.double().sum() / divisor, 5)

    @pytest.mark.parametrize("ignored", ["absent", "unknown"])
    def test_both_differentiate_exactly(self, ignored: Ignored) -> None:
        crf, (emissions, tags) = made(dtype=torch.float64), self.labels()

        def loss(f: Tensor, *parameters: Tensor) -> Tensor:
            named = dict(zip(dict(crf.named_parameters()), parameters, strict=True))
            value: Tensor = torch.func.functional_call(crf, named, (f, tags, self.MASK, "none"), {"ignored": ignored})
            return value

        inputs = (emissions.double().requires_grad_(), *(p.detach().requires_grad_() for p in crf.parameters()))
        assert torch.autograd.gradcheck(loss, inputs)

    @pytest.mark.parametrize("ignored", ["absent", "unknown"])
    def test_all_known_is_the_plain_loss(self, ignored: Ignored) -> None:
        assert_right(made(), *batch(ANY_MASK), ANY_MASK, ignored)

    @pytest.mark.parametrize("ignored", ["absent", "unknown"])
    def test_another_label_out_of_range_still_raises(self, ignored: Ignored) -> None:
        emissions, tags = self.labels()
        tags[2, 0] = K
        with pytest.raises(ValueError, match=rf"got {K} for sequence 2, step 0"):
            CRF(K, batch_first=True).nll(emissions, tags, self.MASK, ignored=ignored)

    def test_unknown_under_constraints(self) -> None:
        """A forbidden tag next to an unknown one: +inf and no gradient for that sequence alone."""
        crf, mask = made(), torch.ones(2, 3, dtype=torch.bool)
        emissions, tags = batch(mask)[0], torch.tensor([[0, -100, 1], [0, -100, 2]])
        emissions[0, 2, 1] = -torch.inf
        loss = crf.nll(emissions.requires_grad_(), tags, mask, "none", ignored="unknown")
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
        loss = CRF(K, batch_first=True).nll(*batch(torch.ones(2, 3)), None, "none", ignored="unknown")
        assert (loss == 0).all()


class TestValues:
    def test_nll_is_the_negative_with_mean_as_default(self) -> None:
        """pytorch-crf #81: a log-likelihood that is taken for a loss."""
        crf, (emissions, tags) = made(), batch(ANY_MASK)
        each = crf.nll(emissions, tags, ANY_MASK, "none").double()
        assert (each >= 0).all()
        divisors: dict[Reduction, int] = {"sum": 1, "mean": 5, "token_mean": 10}
        for reduction, divisor in divisors.items():
            loss = crf.nll(emissions, tags, ANY_MASK, reduction)
            assert_close(loss, each.sum() / divisor, 5)
            assert torch.equal(loss, -crf(emissions, tags, ANY_MASK, reduction))
        assert torch.equal(crf.nll(emissions, tags, ANY_MASK), crf.nll(emissions, tags, ANY_MASK, "mean"))
        assert torch.equal(crf(emissions, tags, ANY_MASK), crf(emissions, tags, ANY_MASK, "sum"))

    @LAYOUTS
    def test_a_forbidden_gold_path_and_a_sequence_without_paths(self, batch_first: bool) -> None:
        """pytorch-crf: one -inf transition makes NaN gradients; an infeasible lattice a NaN loss for the batch."""
        crf, mask = made(batch_first), torch.ones(3, 3, dtype=torch.bool)
        with torch.no_grad():
            crf.transitions[0, 1] = -torch.inf
        emissions, tags = batch(mask)[0], torch.tensor([[0, 1, 2], [0, 2, 1], [0, 0, 0]])
        emissions[2, 1] = -torch.inf
        f, y = laid(batch_first, emissions, tags)
        for ignored in MEANINGS:
            value = crf(f.requires_grad_(), y, None, "none", ignored=ignored)
            assert value[0] == value[2] == -torch.inf
            assert value[1].isfinite()
            assert crf(f, y, ignored=ignored) == -torch.inf
            grads = gradients(value, crf, f)
            by_row = laid(batch_first, grads["emissions"])[0]
            assert (by_row[[0, 2]] == 0).all()
            assert (by_row[1] != 0).any()
            assert grads["transitions"][0, 1] == 0
            assert all(grad.isfinite().all() for grad in grads.values())
        assert crf.decode(f)[2] == crf.decode(f, laid(batch_first, mask)[0])[2] == [-1, -1, -1]
        assert (laid(batch_first, crf.marginals(f))[0][2] == 0).all()


class TestPrecision:
    @pytest.mark.parametrize(
        ("dtype", "module_too", "batch_first"),
        [(torch.bfloat16, False, False), (torch.bfloat16, True, True), (torch.float16, True, False)],
    )
    def test_half_emissions_are_summed_in_float32(
        self, dtype: torch.dtype, module_too: bool, batch_first: bool
    ) -> None:
        """pytorch-crf in bfloat16 at T=512: 18 % off. Only the inputs are rounded here."""
        crf = made(batch_first, dtype if module_too else torch.float32, num_tags=9)
        emissions, tags = batch(torch.ones(2, 512), num_tags=9)
        f, y = laid(batch_first, emissions.to(dtype), tags)
        value = crf(f.requires_grad_(), y)
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
        (emissions, tags), single = batch(torch.ones(3, 5)), made()
        double = copy.deepcopy(single).double()
        value = double(emissions.double(), tags)
        assert value.dtype == torch.float64
        for mixed in (double(emissions, tags), single(emissions.double(), tags)):
            assert mixed.dtype == torch.float64
            assert_close(mixed, value, 4, abs(value.item()))


class TestCost:
    @pytest.mark.parametrize(
        ("batch_first", "reduction"), [(False, "sum"), (True, "sum"), (False, "mean"), (True, "token_mean")]
    )
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
        crf, inputs = made(), (*batch(ANY_MASK), ANY_MASK.clone())
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


class Tagger(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, K)
        self.crf = CRF(K, batch_first)

    def forward(self, x: Tensor, tags: Tensor, mask: Tensor | None, ignored: Ignored | None = None) -> Tensor:
        return self.crf.nll(self.encoder(x), tags, mask, ignored=ignored)


class TestTorch:
    # torch's own warnings, about itself: when dynamo traces an autograd.Function, on importing inductor
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
    @pytest.mark.parametrize(
        ("batch_first", "mask_dtype", "ignored", "backend"),
        [
            (False, None, None, "aot_eager"),
            (True, torch.bool, None, "aot_eager"),
            (False, torch.uint8, "absent", "aot_eager"),
            (True, None, "unknown", "aot_eager"),
            (False, torch.bool, "unknown", "aot_eager"),
            pytest.param(True, torch.bool, None, "inductor", marks=pytest.mark.slow),
        ],
    )
    def test_compile_fullgraph(
        self, batch_first: bool, mask_dtype: torch.dtype | None, ignored: Ignored | None, backend: str
    ) -> None:
        """torchcrf: a uint8 mask breaks the graph, a bool mask meets a data-dependent check."""
        torch._dynamo.reset()
        model = Tagger(batch_first)
        x, tags, mask = laid(batch_first, torch.randn(*ANY_MASK.shape, 6), batch(ANY_MASK)[1], ANY_MASK)
        given_mask = None if mask_dtype is None else mask.to(mask_dtype)
        results = []
        for net in (model, torch.compile(model, fullgraph=True, backend=backend)):
            loss = net(x, tags, given_mask, ignored)
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for wanted, found in zip(*results, strict=True):
            assert_close(found, wanted, 4)

    def test_copies_and_pickles(self) -> None:
        model = Tagger()
        x, tags = torch.randn(*ANY_MASK.shape, 6), batch(ANY_MASK)[1]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x, tags, ANY_MASK), model(x, tags, ANY_MASK))
            assert twin.crf.transitions is not model.crf.transitions
            assert repr(twin) == repr(model)

    def test_replicas_for_data_parallel(self) -> None:
        """DataParallel puts plain tensors for a shallow copy's parameters; pytorch-crf #31 cannot gather lists."""
        crf, (emissions, tags) = made(), batch(ANY_MASK)
        replica = crf._replicate_for_data_parallel()
        for name, parameter in crf.named_parameters():
            setattr(replica, name, parameter * 1)
        loss = replica(emissions, tags, ANY_MASK, reduction="none")
        assert torch.equal(loss, crf(emissions, tags, ANY_MASK, reduction="none"))
        loss.sum().backward()
        assert crf.transitions.grad is not None
        assert all(x.size(0) == len(tags) for x in replica.viterbi(emissions, ANY_MASK))
        assert torch.equal(nn.DataParallel(crf)(emissions, tags, ANY_MASK), crf(emissions, tags, ANY_MASK))


class TestParameterGroups:
    def test_every_trained_parameter_once(self) -> None:
        """In the group of the CRFs where a CRF has it, alone or tied."""
        model, second, tied = Tagger(), CRF(2), nn.Linear(K, K, bias=False)
        second.transitions = tied.weight = model.crf.transitions
        model.encoder.bias.requires_grad_(False)
        model.crf.end_transitions.requires_grad_(False)
        whole = nn.ModuleList([tied, model, model.crf, second])
        rest, heads = crf_parameter_groups(whole, lr=1e-5, multiplier=50.0)
        assert (rest["lr"], heads["lr"]) == (1e-5, 1e-5 * 50)
        assert [id(p) for p in rest["params"]] == [id(model.encoder.weight)]
        wanted = {id(p) for crf in (model.crf, second) for p in crf.parameters() if p.requires_grad}
        assert {id(p) for p in heads["params"]} == wanted
        assert len(heads["params"]) == len(wanted) == 4

    def test_empty_groups_are_left_out(self) -> None:
        crf, model = CRF(K), Tagger()
        (heads,) = crf_parameter_groups(crf, 1e-5)
        assert heads["lr"] == 1e-5 * 100
        assert [id(p) for p in heads["params"]] == [id(p) for p in crf.parameters()]
        model.crf.requires_grad_(False)
        (rest,) = crf_parameter_groups(model, 1e-5)
        assert rest["lr"] == 1e-5

    def test_a_subclass_with_its_own_encoder(self) -> None:
        crf = type("Everything", (CRF,), {})(K)
        crf.encoder = nn.Linear(6, K)
        rest, heads = crf_parameter_groups(crf, 1e-3)
        assert [id(p) for p in rest["params"]] == [id(p) for p in crf.encoder.parameters()]
        assert len(heads["params"]) == 3

    def test_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match=re.escape("Linear contains no pyseq.nn.CRF")):
            crf_parameter_groups(nn.Linear(2, 2), 1e-5)
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not its parameters, got generator"):
            crf_parameter_groups(nn.Linear(2, 2).parameters(), 1e-5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="lr must be a number, got 'a'"):
            crf_parameter_groups(CRF(2), "a")  # type: ignore[arg-type]
