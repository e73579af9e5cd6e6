"""Hard constraints of nn.CRF, and nn.tag_constraints, against brute force over all paths; n-best."""

import copy
import itertools
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyseq.nn import CRF, HMM, MEMM, tag_constraints
from pyseq.nn.constraints import Constraints, Scheme

ROOM = "chain"
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
K = len(LABELS)
LAYOUTS = pytest.mark.parametrize("batch_first", [False, True])
# (B, T) = (5, 4): right and left padding, holes, a masked first step, nothing live
MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
# what may follow what, written out: the first column is a tag, then what may follow it; ^ and $ are the ends
BY_HAND: dict[tuple[Scheme, str], str] = {
    ("BIO", "O B-X I-X B-Y I-Y"): "^:O B-X B-Y; O:O B-X B-Y $; B-X:O B-X I-X B-Y $; I-X:O B-X I-X B-Y $; "
    "B-Y:O B-X B-Y I-Y $; I-Y:O B-X B-Y I-Y $",
    ("BIOES", "B-X I-X E-X S-X O E-Y B-Y"): "^:B-X S-X O B-Y; B-X:I-X E-X; I-X:I-X E-X; E-X:B-X S-X O B-Y $; "
    "S-X:B-X S-X O B-Y $; O:B-X S-X O B-Y $; E-Y:B-X S-X O B-Y $; B-Y:E-Y",
    ("BMES", "B M E S"): "^:B S; B:M E; M:M E; E:B S $; S:B S $",
    ("BMES", "S-a-b M M-a-b B O"): "^:S-a-b B O; S-a-b:S-a-b B O $; M:M; M-a-b:M-a-b; B:M; O:S-a-b B O $",
    ("BIO", "I B"): "^:B; I:I B $; B:I B $",
    ("BIO", "O"): "^:O; O:O $",
}


@pytest.mark.parametrize(("scheme", "names"), BY_HAND)
def test_schemes_by_hand(scheme: Scheme, names: str) -> None:
    labels, after = names.split(), dict(rule.strip().split(":") for rule in BY_HAND[scheme, names].split(";"))
    start, transitions, end = tag_constraints(labels, scheme)
    assert start.dtype == transitions.dtype == end.dtype == torch.bool
    assert [x for x, allowed in zip(labels, start.tolist(), strict=True) if allowed] == after["^"].split()
    for label, row, last in zip(labels, transitions.tolist(), end.tolist(), strict=True):
        found = [x for x, allowed in zip(labels, row, strict=True) if allowed] + ["$"] * last
        assert found == after.get(label, "").split()


@pytest.mark.parametrize(
    ("labels", "scheme", "error", "message"),
    [
        (["O"], "BILOU", ValueError, "scheme must be 'BIO', 'BIOES' or 'BMES', got 'BILOU'"),
        (["O", "E-X"], "BIO", ValueError, "BIO has no label 'E-X', which is at position 1; wanted O, or one of B, I,"),
        (["B_X"], "BIOES", ValueError, "BIOES has no label 'B_X', which is at position 0; wanted O, or one of B, I, "),
        (["S", "I"], "BMES", ValueError, "BMES has no label 'I', which is at position 1; wanted O, or one of B, M, E"),
        (["O-X"], "BIO", ValueError, "BIO has no label 'O-X'"),
        (["B-"], "BIO", ValueError, "BIO has no label 'B-'"),
        (["BI"], "BIO", ValueError, "BIO has no label 'BI'"),
        (["[PAD]", "O"], "BIO", ValueError, "BIO has no label '[PAD]', which is at position 0"),
        ([""], "BIO", ValueError, "BIO has no label ''"),
        (["O", "B-X", "O"], "BIO", ValueError, "label 'O' is at position 2 and at 0; name each tag once"),
        ([], "BIO", ValueError, "labels must not be empty"),
        (
            "BI",
            "BIO",
            TypeError,
            "labels must be a sequence of strings, in the order of their numbers, got the string 'BI'; use list(...)",
        ),
        ({"B-X": 1, "O": 0}, "BIO", TypeError, "got dict; use sorted(labels, key=labels.get)"),
        (None, "BIO", TypeError, "got NoneType"),
        ([0, "O"], "BIO", TypeError, "labels must be strings, got 0 at position 0"),
    ],
)
def test_labels_outside_the_scheme(labels: Any, scheme: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tag_constraints(labels, scheme)


def made(batch_first: bool = True, constraints: Constraints | None = None, num_tags: int = K) -> CRF:
    torch.manual_seed(3)
    crf = CRF(num_tags, batch_first, constraints=constraints)
    for parameter in crf.parameters():
        nn.init.normal_(parameter)
    return crf


def bio() -> tuple[Tensor, Tensor, Tensor]:
    """And no chunk of PER ends a sequence."""
    start, transitions, end = tag_constraints(LABELS, "BIO")
    end[1:3] = False
    return start, transitions, end


def laid(batch_first: bool, *tensors: Tensor) -> list[Tensor]:
    return [x if batch_first else x.transpose(0, 1).contiguous() for x in tensors]


def legal_paths(emissions: Tensor, crf: CRF, constraints: Constraints) -> tuple[Tensor, Tensor]:
    """Allowed paths of one sequence (T, K) without masked steps, in lexical order, and their scores in float64."""
    start, transitions, end = (None if x is None else x.tolist() for x in constraints)
    steps = range(len(emissions))
    paths = [
        path
        for path in itertools.product(range(crf.num_tags), repeat=len(emissions))
        if not path
        or (
            (start is None or start[path[0]])
            and (end is None or end[path[-1]])
            and (transitions is None or all(transitions[i][j] for i, j in itertools.pairwise(path)))
        )
    ]
    found = torch.tensor(paths, dtype=torch.long).view(len(paths), len(emissions))
    s, e, g = (x.detach().double() for x in (crf.start_transitions, crf.end_transitions, crf.transitions))
    scores = emissions.double()[steps, found].sum(1) + g[found[:, :-1], found[:, 1:]].sum(1)
    return found, scores + s[found[:, 0]] + e[found[:, -1]] if steps else scores


@LAYOUTS
@pytest.mark.parametrize("given", [(0, 1, 2), (1,), (0, 2), ()], ids=["all", "transitions", "ends", "none"])
def test_brute_force(batch_first: bool, given: tuple[int, ...]) -> None:
    """Loss, its gradients, marginals, best and n-best paths count allowed paths alone; nothing happens to weights."""
    start, transitions, end = (x if i in given else None for i, x in enumerate(bio()))
    constraints = start, transitions, end
    crf = made(batch_first, constraints)
    before = copy.deepcopy(crf.state_dict())
    emissions, tags = torch.randn(5, 4, K), torch.tensor([0, 3, 4, 0]).expand(5, 4).clone()
    tags[1, 2] = tags[2, 0] = 3
    tags[4] = -100
    f, y, m = laid(batch_first, emissions, tags, MASK)
    f.requires_grad_()
    losses = crf.nll(f, y, m, "none")
    losses.sum().backward()
    scores, best = crf.viterbi(f, m)
    all_scores, all_paths = crf.viterbi(f, m, n_best=6)
    assert (all_scores.shape, all_paths.shape) == ((5, 6), (5, 6, 4))
    assert torch.equal(all_scores[:, 0], scores)
    (path, marginals), decoded, ranked = laid(batch_first, best, crf.marginals(f, m)), crf.decode(f, m), []
    assert torch.equal(all_paths[:, 0], path)
    for b, live in enumerate(MASK):
        paths, oracle = legal_paths(emissions[b, live], crf, constraints)
        order = oracle.argsort(descending=True, stable=True)[:6]
        gold = oracle[(paths == tags[b, live]).all(1)]
        torch.testing.assert_close(losses[b].double(), oracle.logsumexp(0) - gold.squeeze(), rtol=1e-5, atol=1e-5)
        assert decoded[b] == path[b, live].tolist() == paths[order[0]].tolist()
        torch.testing.assert_close(all_scores[b, : len(order)].double(), oracle[order], rtol=1e-5, atol=1e-5)
        assert all_paths[b, : len(order)][:, live].tolist() == paths[order].tolist()
        assert (all_scores[b, len(order) :] == -torch.inf).all()
        assert (all_paths[b, len(order) :] == -1).all()
        assert (all_paths[b][:, ~live] == -1).all()
        ranked.append(paths[order].tolist())
        p = torch.zeros(int(live.sum()), K, dtype=torch.float64)
        for t in range(len(p)):
            p[t].index_add_(0, paths[:, t], oracle.softmax(0))
        torch.testing.assert_close(marginals[b, live].double(), p, rtol=1e-4, atol=1e-6)
    assert crf.decode(f, m, n_best=6) == ranked
    assert all(torch.equal(x, before[name]) for name, x in crf.state_dict().items())
    twin = made(batch_first)
    with torch.no_grad():
        for name, allowed in zip(("start_transitions", "transitions", "end_transitions"), constraints, strict=True):
            if allowed is not None:
                getattr(twin, name)[~allowed] = -torch.inf
    g = f.detach().requires_grad_()
    twin.nll(g, y, m, "none").sum().backward()
    for x, z in zip((f, *crf.parameters()), (g, *twin.parameters()), strict=True):
        assert x.grad is not None
        assert z.grad is not None
        assert torch.equal(x.grad, z.grad)


@pytest.mark.parametrize("ignored", [None, "absent", "unknown"])
def test_forbidden_gold_tags_and_sequences_without_a_path(ignored: Any) -> None:
    """Their loss is +inf without any gradient, and the others do not notice."""
    crf, last = made(constraints=bio()), -100 if ignored else 3
    emissions = torch.randn(3, 3, K)
    emissions[2, 0, [0, 1, 3]] = -torch.inf  # what may come first
    tags = torch.tensor([[0, 2, last], [1, 2, last], [0, 0, last]])
    rows, grads = [], []
    for which in (slice(3), slice(1, 2)):
        f = emissions[which].clone().requires_grad_()
        loss = crf.nll(f, tags[which], None, "none", ignored=ignored)
        named = [f, *crf.parameters()]
        grads.append(torch.autograd.grad(loss.sum(), named))
        rows.append(loss)
    if ignored == "absent":  # a sequence must not end in PER
        assert rows[0].tolist() == [torch.inf, torch.inf, torch.inf]
        return
    assert rows[0].tolist() == [torch.inf, rows[1].item(), torch.inf]
    assert rows[1].isfinite().all()
    assert (grads[0][0][[0, 2]] == 0).all()
    assert torch.equal(grads[0][0][1:2], grads[1][0])
    assert all(torch.equal(x, y) for x, y in zip(grads[0][1:], grads[1][1:], strict=True))
    assert crf.decode(emissions)[2] == [-1, -1, -1]
    assert crf.decode(emissions, n_best=2)[2] == []
    assert len(crf.decode(emissions, n_best=2)[1]) == 2


def test_n_best_of_few_paths() -> None:
    """Fewer paths than asked for, and sequences with none, with one empty path, and with a NaN."""
    crf, emissions = made(num_tags=2), torch.zeros(3, 1, 2)
    emissions[1], emissions[2] = -torch.inf, torch.nan
    mask = torch.tensor([[True], [True], [True]])
    assert [len(paths) for paths in crf.decode(emissions, mask, n_best=3)] == [2, 0, 0]
    assert crf.decode(emissions[:1], ~mask[:1], n_best=3) == [[[]]]
    assert crf.decode(emissions[:0], n_best=3) == []
    scores, paths = crf.viterbi(emissions, mask, n_best=3)
    assert scores[0, 2] == scores[1, 0] == -torch.inf
    assert (paths[0, 2] == -1).all()
    assert (paths[1:] == -1).all()


@pytest.mark.parametrize("layer", [CRF(2), HMM(2, 2)], ids=["CRF", "HMM"])
def test_wrong_n_best(layer: Any) -> None:
    x: Any = torch.zeros(3, 1, 2) if isinstance(layer, CRF) else torch.zeros(3, 1, dtype=torch.long)
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="n_best"):
            layer.decode(x, n_best=wrong)
    with pytest.raises(TypeError, match="compute='marginals' takes no n_best; 'viterbi' and 'decode' do"):
        layer(x, None, compute="marginals", n_best=2)


def test_n_best_goes_through_hooks() -> None:
    crf, seen = made(), []
    crf.register_forward_hook(lambda module, args, kwargs, output: seen.append(kwargs), with_kwargs=True)
    crf.decode(torch.zeros(1, 2, K), n_best=2)
    crf.viterbi(torch.zeros(1, 2, K), n_best=2)
    assert seen == [
        {"compute": "decode", "n_best": 2, "allowed": None},
        {"compute": "viterbi", "n_best": 2, "allowed": None},
    ]


ONES = torch.ones(K, dtype=torch.bool)
TRIPLE = "constraints must be (start, transitions, end), as tag_constraints gives them"
WHAT = "must be None or a bool tensor of shape"


@pytest.mark.parametrize("build", [lambda c: CRF(K, constraints=c), lambda c: HMM(K, 3, constraints=c)])
@pytest.mark.parametrize(
    ("constraints", "error", "message"),
    [
        (ONES, TypeError, f"{TRIPLE}, got Tensor"),
        ((ONES, None), ValueError, f"{TRIPLE}, got 2 of them"),
        ((None, ONES, None), ValueError, f"the constraint on transitions {WHAT} (5, 5), True where allowed, got"),
        ((ONES[1:], None, None), ValueError, f"the constraint on start {WHAT} (5,), True where allowed, got shape (4"),
        ((None, None, ONES.float()), TypeError, "got dtype torch.float32; for scores of 0 and -inf use scores == 0"),
        (([True] * K, None, None), TypeError, "got list; use torch.tensor"),
        ((ONES.to("meta"), None, None), ValueError, "on meta, which has no values; make it with device='cpu'"),
    ],
)
def test_wrong_constraints(build: Any, constraints: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build(constraints)


def test_they_are_no_weights() -> None:
    """Not in the state dict, averages, casts and optimizers; in copies, pickles and where the weights are."""
    given = bio()
    crf, plain = made(constraints=given), made()
    x, tags = torch.randn(2, 3, K), torch.tensor([[1, 2, 0]] * 2)
    wanted = crf.nll(x, tags)
    given[1].zero_()  # a copy was made
    assert crf.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(crf.state_dict(), strict=True)
    crf.load_state_dict(plain.state_dict(), strict=True)
    averages = torch.optim.swa_utils
    average: Any = averages.AveragedModel(crf, multi_avg_fn=averages.get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(3):
        average.update_parameters(crf)
    replica = crf._replicate_for_data_parallel()
    for name, parameter in crf.named_parameters():
        setattr(replica, name, parameter * 1)
    for twin in (copy.deepcopy(crf), pickle.loads(pickle.dumps(crf)), average.module, replica, crf.double().float()):
        torch.testing.assert_close(twin.nll(x, tags), wanted)
    assert plain.nll(x, tags) > wanted
    assert repr(crf) == "CRF(num_tags=5, constraints on start, transitions, end)"
    optimizer = torch.optim.SGD(crf.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        crf.nll(x, tags).backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in crf.parameters())
    assert crf.decode(torch.eye(K)[[2, 2, 2]].unsqueeze(0) * 20) != [[2, 2, 2]]


def test_a_model_that_is_built_without_memory() -> None:
    """As transformers does: buffers that no checkpoint has are raw memory there."""
    source = made(constraints=bio())
    with torch.device("meta"):
        crf = CRF(K, batch_first=True, constraints=tag_constraints(LABELS, "BIO"))
    assert crf.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.eye(K)[[2, 4, 0]].unsqueeze(0) * 20
    assert source.decode(x) == crf.decode(x) != made().decode(x) == [[2, 4, 0]]


@pytest.mark.gpu
def test_they_follow_the_weights() -> None:
    crf = made(constraints=bio())
    x = torch.randn(2, 3, K)
    wanted = crf.decode(x)
    assert crf.cuda().decode(x.cuda()) == wanted
    assert all(allowed is not None and allowed.is_cuda for allowed in crf._allowed)
    assert crf.cpu().decode(x) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    crf, x, tags = (
        made(constraints=bio()).to(dtype),
        torch.randn(2, 50, K).to(dtype),
        torch.zeros(2, 50, dtype=torch.long),
    )
    wanted = copy.deepcopy(crf).double()
    loss = crf.nll(x, tags)
    assert loss.dtype == crf.viterbi(x, n_best=2)[0].dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), wanted.nll(x.double(), tags), rtol=1e-6, atol=0)
    assert crf.decode(x, n_best=3) == wanted.decode(x.double(), n_best=3)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in crf.parameters())


# torch's own warning, about itself, when dynamo traces an autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_fullgraph() -> None:
    torch._dynamo.reset()
    crf, x, tags = made(constraints=bio()), torch.randn(5, 4, K), torch.zeros(5, 4, dtype=torch.long)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return crf.nll(x, tags, MASK), crf.viterbi(x, MASK, n_best=3)[1]

    found, wanted = torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(loss, [*crf.parameters()]) for loss, _ in (found, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("head", [CRF, MEMM])
def test_sets_of_tags(head: Any, constrained: bool, batch_first: bool) -> None:
    """In place of tags: what "unknown" labels say, in the loss and in decoding, which keeps to them."""
    labels = ["O", "B", "I"]
    layer = head(3, batch_first, constraints=tag_constraints(labels, "BIO") if constrained else None)
    f, tags = torch.randn(4, 6, 3), torch.tensor([[0, 1, 2, 0, 1, 2]]).repeat(4, 1)
    mask = torch.rand(4, 6) < 0.8
    unknown = torch.rand(4, 6) < 0.5
    allowed = unknown.unsqueeze(2) | (torch.arange(3) == tags.unsqueeze(2))
    labelled = torch.where(unknown, -100, tags)
    f, tags, mask, allowed, labelled = (
        x if batch_first else x.transpose(0, 1) for x in (f, tags, mask, allowed, labelled)
    )
    for reduction in ("none", "sum", "mean", "token_mean"):
        right = layer.nll(f, labelled, mask, reduction, ignored="unknown")
        torch.testing.assert_close(layer.nll(f, None, mask, reduction, allowed=allowed), right)
        torch.testing.assert_close(layer(f, None, mask, reduction, allowed=allowed), -right)
    every = torch.ones_like(allowed)
    assert layer.nll(f, None, mask, "sum", allowed=every).abs() < 1e-5
    assert layer.nll(f, None, mask, "none", allowed=~every).isinf().tolist() == mask.any(int(batch_first)).tolist()
    best, path = layer.viterbi(f, mask, allowed=allowed)
    assert (allowed.gather(2, path.clamp(min=0).unsqueeze(2)).squeeze(2) | ~mask)[path >= 0].all()
    scores = layer.viterbi(f, mask, n_best=3, allowed=allowed)[0]
    torch.testing.assert_close(scores[:, 0], best)
    assert (best <= layer.viterbi(f, mask)[0] + 1e-5).all()
    lines = layer.decode(f, mask, allowed=allowed)
    rows = zip(path if batch_first else path.T, mask if batch_first else mask.T, strict=True)
    assert lines == [tags[live].tolist() for tags, live in rows]
    for options, error, message in (
        ({"tags": tags, "allowed": allowed}, ValueError, "give one of them, and None for the other"),
        ({"tags": None, "allowed": allowed[:2]}, ValueError, "the dimensions of emissions and allowed must match"),
        ({"tags": None, "allowed": allowed.float()}, TypeError, "allowed must be of dtype torch.bool"),
        ({"tags": None, "allowed": allowed, "ignored": "absent"}, ValueError, "ignored='absent' is for tags"),
        ({"tags": None, "allowed": allowed, "compute": "marginals"}, TypeError, "takes no allowed"),
        ({"tags": None}, TypeError, "tags must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            layer(f, mask=mask, **options)
