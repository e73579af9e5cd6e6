"""nn.CRF against brute force over all paths, and under hooks. What pytorch-crf says is in test_crf_drop_in.py."""

import copy
import itertools
import pickle
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pyseq import ops
from pyseq.nn import CRF, crf_parameter_groups
from pyseq.nn.crf import Ignored, Reduction

ROOM = "chain"
K = 4
NATS = 20.0  # path scores and log Z of the small problems here are below this
REDUCTIONS: list[Reduction] = ["none", "sum", "mean", "token_mean"]
FIRST_TWO = "the first two dimensions of emissions and"
LAYOUTS = pytest.mark.parametrize("batch_first", [False, True])
MEANINGS = pytest.mark.parametrize("ignored", [None, "absent", "unknown"])
# (B, T) = (5, 4): right and left padding, holes, a masked first step, nothing live
ANY_MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)


def made(batch_first: bool = True) -> CRF:
    """With parameters of the size of the emissions."""
    torch.manual_seed(3)
    crf = CRF(K, batch_first)
    for parameter in crf.parameters():
        nn.init.normal_(parameter)
    return crf


def batch(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Emissions (B, T, K) and tags (B, T), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    emissions = torch.randn(*mask.shape, K, generator=generator)
    return emissions, torch.randint(K, mask.shape, generator=generator)


def laid(batch_first: bool, *tensors: Tensor) -> list[Tensor]:
    """Batch-first tensors in a module's layout, dense."""
    return [x if batch_first else x.transpose(0, 1).contiguous() for x in tensors]


def all_paths(crf: CRF, emissions: Tensor) -> tuple[Tensor, Tensor]:
    """Every path of one sequence (T, K) without masked steps, and their scores in float64."""
    start, end, transitions = (x.double() for x in (crf.start_transitions, crf.end_transitions, crf.transitions))
    steps = range(len(emissions))
    paths = torch.tensor(list(itertools.product(range(K), repeat=len(steps))), dtype=torch.long)
    scores = emissions[steps, paths].sum(1) + transitions[paths[:, :-1], paths[:, 1:]].sum(1)
    return paths, scores + start[paths[:, 0]] + end[paths[:, -1]] if steps else scores


def gradients(value: Tensor, crf: nn.Module, emissions: Tensor) -> dict[str, Tensor]:
    named = {"emissions": emissions, **dict(crf.named_parameters())}
    found = torch.autograd.grad(value.sum(), list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def everything(crf: CRF, emissions: Tensor, tags: Tensor, mask: Tensor | None, **options: Any) -> dict[str, Tensor]:
    """What every method gives: losses by reduction, the gradients of their sum, marginals, best paths."""
    f = emissions.detach().requires_grad_()
    losses: dict[str, Tensor] = {reduction: crf.nll(f, tags, mask, reduction, **options) for reduction in REDUCTIONS}
    decoded = torch.tensor([tag for row in crf.decode(f, mask) for tag in row])
    scores, path = crf.viterbi(f, mask)
    best = {"decoded": decoded, "scores": scores, "path": path, "marginals": crf.marginals(f, mask)}
    return {**losses, **gradients(losses["sum"], crf, f), **best}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def assert_close(found: Tensor, oracle: Tensor, roundings: int, scale: float = NATS) -> None:
    """Within so many roundings of numbers of the size `scale`, in the precision of `found`."""
    assert found.shape == oracle.shape
    budget = roundings * torch.finfo(found.dtype).eps * max(scale, 1.0)
    torch.testing.assert_close(found.detach().double(), oracle.detach().double(), rtol=0, atol=budget)


@LAYOUTS
@pytest.mark.parametrize("ignored", [None, "unknown"])
def test_brute_force(batch_first: bool, ignored: Ignored | None) -> None:
    """pytorch-crf #46, #61, #85, #110, #122; AllenNLP #3523; TFA and LightSeq on left padding and holes. pytorch-crf
    #81: a log-likelihood that is taken for a loss."""
    crf, (emissions, tags) = made(batch_first), batch(ANY_MASK)
    if ignored == "unknown":
        tags[[0, 1, 1, 2, 2], [1, 2, 3, 0, 3]] = -100  # in the second sequence nothing is known
    f, y, m = laid(batch_first, emissions, tags, ANY_MASK)
    found = everything(crf, f, y, m, ignored=ignored)
    assert (found["path"].shape, found["marginals"].shape) == (m.shape, f.shape)
    path, marginals, found["emissions"] = laid(batch_first, *(found[x] for x in ("path", "marginals", "emissions")))
    decoded = crf.decode(f, m)
    emissions, losses = emissions.double().requires_grad_(), []
    for b, live in enumerate(ANY_MASK):
        paths, scores = all_paths(crf, emissions[b, live])
        assert decoded[b] == path[b, live].tolist() == paths[scores.argmax()].tolist()
        assert_close(found["scores"][b], scores.max(), 4)
        log_z, gold = scores.logsumexp(0), tags[b, live]
        assert_close(marginals[b], torch.autograd.grad(log_z, emissions, retain_graph=True)[0][b], 4)
        losses.append(log_z - scores[((paths == gold) | (gold == -100)).all(1)].logsumexp(0))
    oracle = torch.stack(losses)
    assert (found["none"] >= 0).all()
    assert_close(found["none"], oracle, 4)
    for name, grad in gradients(oracle, crf, emissions).items():
        assert_close(found[name], grad, 4 * len(tags))
    for name, divisor in (("sum", 1), ("mean", len(tags)), ("token_mean", int(ANY_MASK.sum()))):
        assert_close(found[name], found["none"].double().sum() / divisor, 5)
    assert torch.equal(path == -1, ~ANY_MASK)
    assert torch.equal(crf.nll(f, y, m, ignored=ignored), found["mean"])
    assert torch.equal(crf(f, y, m, ignored=ignored), -found["sum"])
    assert torch.equal(crf(f, y, m, "none", ignored=ignored), -found["none"])


@LAYOUTS
@MEANINGS
def test_nothing_is_read_where_masked(batch_first: bool, ignored: Ignored | None) -> None:
    """pytorch-crf #41, #89, #106, #119: padding labels of -100 are an IndexError, on CUDA a device assert."""
    crf, (emissions, tags) = made(batch_first), batch(ANY_MASK)
    results = []
    for fill, label in ((0.0, 0), (torch.nan, -100), (torch.inf, 999), (-torch.inf, -(2**40))):
        filled = emissions.masked_fill(~ANY_MASK.unsqueeze(2), fill), tags.masked_fill(~ANY_MASK, label)
        f, y, m = laid(batch_first, *filled, ANY_MASK)
        results.append(everything(crf, f, y, m, ignored=ignored))
        assert (results[-1]["emissions"][~m] == 0).all()
        assert_same(results[-1], results[0])


@LAYOUTS
@MEANINGS
def test_other_ways_to_say_the_same(batch_first: bool, ignored: Ignored | None) -> None:
    """A uint8 mask, no mask for a full one, another `ignore_index`, and "absent" for what a mask could say."""
    crf = made(batch_first)
    f, y, mask = laid(batch_first, *batch(ANY_MASK), ANY_MASK)
    for given, same in ((mask.byte() * 255, mask), (None, torch.ones_like(mask))):
        wanted = everything(crf, f, y if ignored is None else y.masked_fill(y == 1, -100), same, ignored=ignored)
        assert_same(everything(crf, f, y, given, ignored=ignored, ignore_index=1), wanted)
        if ignored == "absent":
            for reduction in REDUCTIONS:
                assert torch.equal(wanted[reduction], crf.nll(f, y, same & (y != 1), reduction))


@MEANINGS
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
def test_nothing_live_at_all(shape: tuple[int, int], ignored: Ignored | None) -> None:
    """Losses and gradients are 0; without sequences their mean is NaN, as torch's."""
    mask = torch.zeros(shape, dtype=torch.bool)
    given = mask if mask.numel() else None
    found = everything(made(), *batch(mask), given, ignored=ignored)
    assert found["none"].shape == shape[:1]
    assert found["mean"].isnan() if shape[0] == 0 else found["mean"] == 0
    assert all((found[name] == 0).all() for name in ("none", "sum", "token_mean", "emissions", "transitions"))
    assert made().decode(batch(mask)[0], given) == [[]] * shape[0]


@LAYOUTS
@MEANINGS
def test_a_forbidden_gold_path_and_a_sequence_without_paths(batch_first: bool, ignored: Ignored | None) -> None:
    """pytorch-crf: one -inf transition makes NaN gradients; an infeasible lattice a NaN loss for the batch."""
    crf, mask, first = made(batch_first), torch.ones(3, 3, dtype=torch.bool), 0 if ignored is None else -100
    with torch.no_grad():
        crf.transitions[0, 1] = -torch.inf
    emissions, tags = batch(mask)[0], torch.tensor([[first, 0, 1], [first, 2, 1], [first, 0, 0]])
    emissions[2, 1] = -torch.inf
    f, y, m = laid(batch_first, emissions, tags, mask)
    found = everything(crf, f, y, None, ignored=ignored)
    second_f, second_y = laid(batch_first, emissions[1:2], tags[1:2])
    alone = everything(crf, second_f, second_y, None, ignored=ignored)
    assert found["none"].tolist() == [torch.inf, alone["sum"].item(), torch.inf]
    assert found["sum"] == found["mean"] == torch.inf
    by_row, wanted = laid(batch_first, found["emissions"], alone["emissions"])
    assert (by_row[[0, 2]] == 0).all()
    assert torch.equal(by_row[1:2], wanted)
    assert all(torch.equal(found[name], alone[name]) for name, _ in crf.named_parameters())
    assert crf.decode(f)[2] == crf.decode(f, m)[2] == [-1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("module_dtype", [None, torch.float32, torch.float64])
def test_dtypes(module_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    """pytorch-crf in bfloat16 at T=512: 18 % off. Only the inputs are rounded here."""
    module_dtype = module_dtype or dtype
    crf = made().to(module_dtype)
    emissions, tags = batch(torch.ones(2, 512))
    f = emissions.to(dtype).requires_grad_()
    value = crf(f, tags)
    assert_close(value, copy.deepcopy(crf).double()(f.double(), tags), 4, abs(value.item()))
    value.backward()
    assert [x.grad.dtype for x in (f, *crf.parameters()) if x.grad is not None] == [dtype, *3 * [module_dtype]]
    wanted = torch.float64 if torch.float64 in (module_dtype, dtype) else torch.float32
    assert value.dtype == crf.marginals(f).dtype == crf.viterbi(f)[0].dtype == wanted


@LAYOUTS
@MEANINGS
def test_inputs_are_left_alone(batch_first: bool, ignored: Ignored | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not copied. torch-struct sets requires_grad on the caller's tensor; torbi exponentiates it in place."""
    spy = Mock(wraps=ops.crf_nll)
    monkeypatch.setattr(ops, "crf_nll", spy)
    crf = CRF(K, batch_first)
    emissions, tags, mask = inputs = laid(batch_first, *batch(ANY_MASK), ANY_MASK.clone())
    crf.nll(emissions, tags, mask, "token_mean", ignored=ignored).backward()
    if ignored is None:
        ((given, _),) = spy.call_args_list
        assert [given[k].data_ptr() for k in (0, 2, 5)] == [x.data_ptr() for x in inputs]
    for method in (crf.decode, crf.viterbi, crf.marginals):
        method(emissions, mask)
    before = laid(batch_first, *batch(ANY_MASK), ANY_MASK)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert not any(x.requires_grad for x in inputs)


def test_parameters() -> None:
    torch.manual_seed(7)
    crf = CRF(5)
    assert repr(crf) == "CRF(num_tags=5)"
    assert (crf.num_tags, crf.batch_first, CRF(5, True).batch_first) == (5, False, True)
    shapes = {name: tuple(x.shape) for name, x in crf.named_parameters()}
    assert shapes == {"start_transitions": (5,), "end_transitions": (5,), "transitions": (5, 5)}
    before = copy.deepcopy(crf.state_dict())
    nn.init.constant_(crf.transitions, 9)
    torch.manual_seed(7)
    crf.reset_parameters()
    for name, x in crf.named_parameters():
        assert torch.equal(x, before[name])
        assert 0 < x.abs().max() <= 0.1


@pytest.mark.parametrize("num_tags", ["4", 4.0, True, None, torch.tensor(3.0)])
def test_num_tags_must_be_an_integer(num_tags: int) -> None:
    with pytest.raises(TypeError, match=re.escape(f"num_tags must be an integer, got {num_tags!r}")):
        CRF(num_tags)
    assert type(CRF(torch.tensor(3)).num_tags) is int  # type: ignore[arg-type]
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"^invalid number of tags: {number}$"):
            CRF(number)


LABELS = torch.tensor([[0, -100], [1, 2], [3, 0]])
LIVE = torch.ones(3, 2, dtype=torch.bool)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"emissions": torch.zeros(2, K), "mask": LIVE[1:]}, ValueError, "emissions must have dimension of 3, got 2"),
    ({"emissions": torch.zeros(3, 2, 3), "mask": LIVE.T}, ValueError, "last dimension of emissions is 4, got 3"),
    ({"mask": LIVE[1:], "reduction": "total"}, ValueError, f"{FIRST_TWO} mask must match, got (3, 2) and (2, 2)"),
    ({"emissions": torch.zeros(3, 2, K).long()}, TypeError, "got torch.int64"),
    ({"mask": LIVE.float()}, TypeError, "mask must be of dtype torch.bool or torch.uint8, got torch.float32"),
    ({"mask": LIVE.long()}, TypeError, "mask must be of dtype torch.bool or torch.uint8, got torch.int64"),
    ({"emissions": [[0]]}, TypeError, "emissions must be a tensor, got list"),
    ({"mask": [[True]]}, TypeError, "mask must be a tensor, got list"),
    ({"tags": LABELS[1:], "mask": LIVE[1:]}, ValueError, f"{FIRST_TWO} tags must match, got (3, 2) and (2, 2)"),
    ({"tags": LABELS[:, 0]}, ValueError, f"{FIRST_TWO} tags must match, got (3, 2) and (3,)"),
    ({"tags": [[0]]}, TypeError, "tags must be a tensor, got list"),
    ({"tags": None}, TypeError, "tags must be a tensor, got NoneType"),
    ({"tags": LABELS.float()}, TypeError, "got torch.float32"),
    ({"tags": LABELS.to("meta")}, ValueError, "tags is on meta"),
    ({"reduction": "total"}, ValueError, "invalid reduction: total"),
    ({}, ValueError, "give nn.CRF or nn.MEMM ignored='absent' or 'unknown' for a label"),
    ({"ignored": "absent", "ignore_index": 1}, ValueError, "got -100 for sequence 1, step 0"),
    ({"ignored": "unknown", "ignore_index": 1}, ValueError, "got -100 for sequence 1, step 0"),
    ({"ignored": "maybe"}, ValueError, "ignored must be None, 'absent' or 'unknown', got 'maybe'"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    ({"ignore_index": True}, TypeError, "ignore_index must be an int, got True"),
    ({"ignore_index": 2**63, "ignored": "absent"}, ValueError, "ignore_index must be a number that a tag can be"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    """The first fault speaks, and shapes before values: the labels hold one that is out of range."""
    crf, given = CRF(K), {"emissions": torch.zeros(3, 2, K), "tags": LABELS, **bad}
    calls: list[Callable[[], Any]] = [lambda: crf(**given), lambda: crf.nll(**given)]
    if bad.keys() & {"emissions", "mask"} and "tags" not in bad:  # what all methods take
        chain = given["emissions"], given.get("mask")
        calls += [lambda: crf.decode(*chain), lambda: crf.viterbi(*chain), lambda: crf.marginals(*chain)]
    for call in calls:
        with pytest.raises(error, match=re.escape(message)):
            call()


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")  # torch, of its prototype
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, K), torch.randn(4, K)], layout=layout)
    with pytest.raises(TypeError, match="emissions must be a dense tensor, got a nested one; use padding and a mask"):
        CRF(K, batch_first=True).decode(nested)


# torch's own warnings, about itself: when dynamo traces an autograd.Function, on importing inductor
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize(
    ("batch_first", "mask_dtype", "ignored", "backend"),
    [
        (True, torch.bool, None, "aot_eager"),
        (False, torch.uint8, "absent", "aot_eager"),
        (True, None, "unknown", "aot_eager"),
        pytest.param(True, torch.bool, None, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compile_fullgraph(batch_first: bool, mask_dtype: Any, ignored: Ignored | None, backend: str) -> None:
    """torchcrf: a uint8 mask breaks the graph, a bool mask meets a data-dependent check."""
    torch._dynamo.reset()
    crf = CRF(K, batch_first)
    f, y, mask = laid(batch_first, *batch(ANY_MASK), ANY_MASK)
    m = None if mask_dtype is None else mask.to(mask_dtype)

    def loss(f: Tensor) -> Tensor:
        return crf.nll(f, y, m, ignored=ignored)

    value, found = loss(f.requires_grad_()), torch.compile(loss, fullgraph=True, backend=backend)(f)
    assert_close(found, value, 4)
    wanted = gradients(value, crf, f)
    for name, grad in gradients(found, crf, f).items():
        assert_close(grad, wanted[name], 4)


def test_copies() -> None:
    """DataParallel puts plain tensors for a shallow copy's parameters; pytorch-crf #31 cannot gather lists."""
    crf, (emissions, tags) = made(), batch(ANY_MASK)
    replica = crf._replicate_for_data_parallel()
    for name, parameter in crf.named_parameters():
        setattr(replica, name, parameter * 1)
    for twin in (copy.deepcopy(crf), pickle.loads(pickle.dumps(crf)), replica):
        assert torch.equal(twin(emissions, tags, ANY_MASK), crf(emissions, tags, ANY_MASK))
        assert twin.transitions is not crf.transitions
    replica(emissions, tags, ANY_MASK).backward()
    assert crf.transitions.grad is not None
    assert all(x.size(0) == len(tags) for x in replica.viterbi(emissions, ANY_MASK))


def test_every_trained_parameter_is_in_one_group() -> None:
    """In that of the CRFs where a CRF has it as its own, alone or tied; a CRF may be a subclass with an encoder.
    Empty groups are left out."""
    encoder, crf, second = nn.Linear(6, K), CRF(K), type("Everything", (CRF,), {})(2)
    second.encoder, tied = nn.Linear(6, 2), nn.Linear(K, K, bias=False)
    second.transitions = tied.weight = crf.transitions
    encoder.bias.requires_grad_(False)
    crf.end_transitions.requires_grad_(False)
    rest, heads = crf_parameter_groups(nn.ModuleList([tied, encoder, crf, crf, second]), lr=1e-5, multiplier=50.0)
    assert (rest["lr"], heads["lr"]) == (1e-5, 1e-5 * 50)
    assert [id(p) for p in rest["params"]] == [id(p) for p in (encoder.weight, *second.encoder.parameters())]
    own = (tied.weight, crf.start_transitions, second.start_transitions, second.end_transitions)
    assert sorted(id(p) for p in heads["params"]) == sorted(id(p) for p in own)
    (heads,) = crf_parameter_groups(crf, 1e-5)
    assert (heads["lr"], len(heads["params"])) == (1e-5 * 100, 2)
    (rest,) = crf_parameter_groups(nn.Sequential(encoder, crf.requires_grad_(False)), 1e-5)
    assert (rest["lr"], len(rest["params"])) == (1e-5, 1)


def test_wrong_arguments_of_parameter_groups() -> None:
    with pytest.raises(ValueError, match=re.escape("Linear contains no pyseq.nn.CRF")):
        crf_parameter_groups(nn.Linear(2, 2), 1e-5)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not its parameters, got generator"):
        crf_parameter_groups(nn.Linear(2, 2).parameters(), 1e-5)  # type: ignore[arg-type]
    for rates in ({"lr": "a"}, {"lr": 1e-5, "multiplier": "a"}):
        with pytest.raises(TypeError, match=f"{list(rates)[-1]} must be a number, got 'a'"):
            crf_parameter_groups(CRF(2), **rates)


def call(crf: CRF, method: str) -> Any:
    (emissions, tags), mask = batch(ANY_MASK), ANY_MASK
    return crf.nll(emissions, tags, mask) if method == "nll" else getattr(crf, method)(emissions, mask)


@pytest.mark.parametrize("method", ["nll", "decode", "viterbi", "marginals"])
def test_hooks_see_every_method_once(method: str) -> None:
    """Also of a subclass; they may change what comes out. `compute` is the method."""
    (emissions, tags), mask, seen = batch(ANY_MASK), ANY_MASK, []
    crf = type("Head", (CRF,), {})(K, batch_first=True)
    wanted = call(crf, method)
    given: tuple[Any, ...] = (emissions, tags, mask, "mean") if method == "nll" else (emissions, None, mask)
    assert str(crf(*given, compute=method)) == str(wanted)
    crf.register_forward_pre_hook(lambda module, args: seen.append(("before", args[0].shape)))
    crf.register_forward_hook(lambda module, args, output: seen.append(("after", type(output))))
    assert str(call(crf, method)) == str(wanted)
    assert seen == [("before", (5, 4, K)), ("after", type(wanted))]
    crf.register_forward_hook(lambda module, args, output: "changed")
    assert call(crf, method) == "changed"


def test_compute_and_tags_must_fit() -> None:
    (emissions, tags), mask = batch(ANY_MASK), ANY_MASK
    with pytest.raises(ValueError, match=r"compute must be .log_likelihood., .nll., .* got .loss."):
        CRF(K, batch_first=True)(emissions, tags, compute="loss")
    with pytest.raises(TypeError, match="compute='viterbi' takes no tags; give None for them, then the mask"):
        CRF(K, batch_first=True)(emissions, mask, compute="viterbi")


CHANGES: dict[str, Callable[[CRF], Any]] = {
    "prune": lambda crf: prune.random_unstructured(crf, "transitions", 0.3),
    "weight_norm by hooks": lambda crf: torch.nn.utils.weight_norm(crf, "transitions"),
    "spectral_norm by hooks": lambda crf: torch.nn.utils.spectral_norm(crf, "transitions"),
    "weight_norm": lambda crf: parametrizations.weight_norm(crf, "transitions"),
    "orthogonal": lambda crf: parametrizations.orthogonal(crf, "transitions"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_training_through_nll_is_training_through_forward(change: str) -> None:
    """Three steps; what recomputes transitions before each forward does so for the loss that the README leads with."""
    crfs = []
    for _ in range(2):  # some copies are no leaves
        torch.manual_seed(0)
        crfs.append(CRF(K, batch_first=True))
        CHANGES[change](crfs[-1])
    first, second = crfs
    assert first.state_dict().keys() != CRF(K).state_dict().keys()
    (emissions, tags), mask = batch(ANY_MASK), ANY_MASK
    for _ in range(3):
        for crf, loss in ((first, first.nll), (second, lambda *args, **kw: -second(*args, **kw))):
            crf.zero_grad()
            loss(emissions, tags, mask, reduction="sum").backward()
            torch.optim.SGD(crf.parameters(), lr=0.1).step()
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(x, y)
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in first.parameters())
    encoder = nn.Linear(4, K)
    rest, heads = crf_parameter_groups(nn.Sequential(encoder, first), lr=1e-5)
    assert {id(x) for x in heads["params"]} == {id(x) for x in first.parameters()}
    assert {id(x) for x in rest["params"]} == {id(x) for x in encoder.parameters()}


@pytest.mark.parametrize(
    ("optimizer", "decay", "spoils"),
    [
        *((name, 0.01, True) for name in ("SGD", "Adam", "RMSprop", "Adagrad", "RAdam")),
        ("Adafactor", 0.0, True),
        ("Adam", 0.0, False),
        ("AdamW", 0.01, False),
    ],
)
def test_what_turns_a_trained_minus_infinity_into_nan(optimizer: str, decay: float, spoils: bool) -> None:
    """What the docstring warns of, of averages too; Adam without decay and AdamW keep it."""
    (emissions, tags), mask = batch(ANY_MASK), ANY_MASK
    crf = CRF(K, batch_first=True)
    nn.init.constant_(crf.transitions[0, 1], -torch.inf)
    chosen = getattr(torch.optim, optimizer)(crf.parameters(), lr=0.1, weight_decay=decay)
    for _ in range(2):
        chosen.zero_grad()
        crf.nll(emissions, torch.zeros_like(tags), mask).backward()
        chosen.step()
    assert bool(crf.transitions[0, 1].isnan()) == spoils
    assert bool((crf.viterbi(emissions)[1] == -1).all()) == spoils
    for average in (None, torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)):
        averaged: Any = torch.optim.swa_utils.AveragedModel(crf, multi_avg_fn=average)
        for _ in range(2):
            averaged.update_parameters(crf)
        assert (averaged.module.viterbi(emissions)[1] == -1).all()


def test_two_processes(on_two: Callable[[str], None]) -> None:
    """Gradients of FSDP2 and of DDP over two gloo processes are those of one process with the joined batch."""
    on_two("crf_on_two.py")


def test_a_subclass_with_a_forward_of_its_own() -> None:
    """As torchcrf's users write it; methods neither meet its signature nor call themselves."""

    class Twice(CRF):
        def forward(self, emissions: Tensor, tags: Tensor) -> Tensor:  # type: ignore[override]
            return self.nll(emissions, tags) - super().forward(emissions, tags, reduction="mean")  # type: ignore[operator]

    (emissions, tags), mask = batch(ANY_MASK), ANY_MASK
    plain, crf = CRF(K, batch_first=True), Twice(K, batch_first=True)
    crf.load_state_dict(plain.state_dict())
    assert torch.equal(crf(emissions, tags), 2 * plain.nll(emissions, tags))
    assert crf.decode(emissions, mask) == plain.decode(emissions, mask)
    assert torch.equal(crf.nll(emissions, tags, mask), plain.nll(emissions, tags, mask))
