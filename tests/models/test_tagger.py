import importlib
import itertools
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyseq.data import Sentence
from pyseq.models import SequenceTagger
from pyseq.reference import chain as reference

ROOM = "chain"
Head = Literal["crf", "softmax"]
HEADS: tuple[Head, ...] = ("crf", "softmax")
CHARS, TAGS = 11, 5
LENGTHS = torch.tensor([7, 1, 4, 5])
EXAMPLES = Path(__file__).parents[2] / "examples"
both = pytest.mark.parametrize("head", HEADS)


def tagger(head: Head = "crf", layers: int = 1) -> SequenceTagger:
    torch.manual_seed(0)
    return SequenceTagger(CHARS, TAGS, embedding=6, hidden=4, layers=layers, dropout=0.0, head=head).double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    chars, tags = (torch.randint(n, (4, 7), generator=generator) for n in (CHARS, TAGS))
    return chars, tags, torch.arange(7) < LENGTHS.unsqueeze(1)


def test_encoder_is_a_bidirectional_lstm_on_packed_sequences() -> None:
    model, (chars, _, mask) = tagger(layers=2), batch()
    peer = nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True).double()
    for i in range(2):
        for suffix, part in (("", model.forwards[i]), ("_reverse", model.backwards[i])):
            for name, value in part.named_parameters():
                getattr(peer, name.replace("l0", f"l{i}") + suffix).data.copy_(value)
    packed = pack_padded_sequence(model.embedding(chars), LENGTHS, batch_first=True, enforce_sorted=False)
    wanted = model.project(pad_packed_sequence(peer(packed)[0], batch_first=True)[0])
    torch.testing.assert_close(model(chars, mask)[mask], wanted[mask])


@both
def test_padding_is_not_used(head: Head) -> None:
    """A row of it alone counts for nothing, and no mask means that there is none."""
    model, (chars, tags, mask) = tagger(head), batch()
    loss, path = model.loss(chars, tags, mask), model.decode(chars, mask)
    wide = torch.arange(9) < torch.tensor([*LENGTHS, 0]).unsqueeze(1)
    other_chars = torch.full((5, 9), CHARS - 1).masked_scatter(wide, chars[mask])
    other_tags = torch.full((5, 9), -100).masked_scatter(wide, tags[mask])
    torch.testing.assert_close(model.loss(other_chars, other_tags, wide), loss)
    found = model.decode(other_chars, wide)
    assert torch.equal(found[:4, :7], path)
    assert torch.equal(found == -1, ~wide)
    everything = torch.ones_like(mask)
    torch.testing.assert_close(model.loss(chars, tags), model.loss(chars, tags, everything))
    assert torch.equal(model.decode(chars), model.decode(chars, everything))


def test_heads() -> None:
    """The CRF is the reference chain, the softmax independent at each step, on equal encoders from equal seeds."""
    model, (chars, tags, mask) = tagger(), batch()
    assert model.crf is not None
    emissions, start, end = model(chars, mask), model.crf.start_transitions, model.crf.end_transitions
    nll = reference.crf_nll(emissions, model.crf.transitions, tags, start, end, mask)
    torch.testing.assert_close(model.loss(chars, tags, mask), nll.sum() / LENGTHS.sum())
    _, path = reference.viterbi(emissions, model.crf.transitions, start, end, mask)
    assert torch.equal(model.decode(chars, mask), path)
    crf, model = dict(model.named_parameters()), tagger("softmax")
    assert all(torch.equal(crf[name], value) for name, value in model.named_parameters())
    scores = model(chars, mask).log_softmax(2)
    wanted = -scores.gather(2, tags.unsqueeze(2)).squeeze(2)[mask].mean()
    torch.testing.assert_close(model.loss(chars, tags, mask), wanted)
    assert torch.equal(model.decode(chars, mask)[mask], scores.argmax(2)[mask])


@both
def test_overfits_a_handful(head: Head) -> None:
    """With each parameter in one group, the CRF's in its own."""
    model, (chars, tags, mask) = tagger(head), batch()
    groups = model.parameter_groups(0.1, 2.0)
    assert [group["lr"] for group in groups] == ([0.1, 0.2] if head == "crf" else [0.1])
    held = [[id(p) for p in group["params"]] for group in groups]
    assert sorted(itertools.chain(*held)) == sorted(id(p) for p in model.parameters())
    if model.crf is not None:
        assert set(held[1]) == {id(p) for p in model.crf.parameters()}
    optimizer = torch.optim.Adam(groups)
    for _ in range(25):
        loss = model.loss(chars, tags, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(model.decode(chars, mask)[mask], tags[mask])


@both
def test_every_method_goes_through_call(head: Head) -> None:
    model, (chars, tags, _), seen = tagger(head), batch(), []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    returned = [model.loss(chars, tags), model.decode(chars), model(chars)]
    assert all(x is y for x, y in zip(returned, seen, strict=True))
    assert torch.equal(model(chars, None, tags, compute="loss"), returned[0])


@both
def test_bad_arguments(head: Head) -> None:
    model, (chars, tags, mask) = tagger(head), batch()
    with pytest.raises(ValueError, match="compute must be 'emissions', 'loss' or 'decode', got 'nll'"):
        model(chars, compute="nll")
    with pytest.raises(TypeError, match="tags must be a tensor, got NoneType"):
        model(chars, compute="loss")
    with pytest.raises(ValueError, match="pad on the right"):
        model.decode(chars, mask.flip(1))
    for wrong in (mask.byte(), mask[:, :1]):
        with pytest.raises(ValueError, match=r"mask must be bool of the shape of chars, \("):
            model.loss(chars, tags, wrong)
    with pytest.raises((ValueError, IndexError), match="-100"):
        model.loss(chars, tags.fill_(-100), mask)
    with pytest.raises(ValueError, match="got 'memm'"):
        SequenceTagger(3, 3, head="memm")  # type: ignore[arg-type]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tqdm", reason="the demo shows progress: pip install tqdm")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("people_daily_tagger")


def test_demo_cuts_and_batches_lines_without_loss(demo: ModuleType) -> None:
    lines = [Sentence(("人民", "在", "北京"), ("n", "p", "ns")), Sentence(("好",), ("a",))]
    vocabulary = demo.index([*lines, lines[0]])
    assert sorted(vocabulary.values()) == [2, 3, 4, 5, 6]
    split = demo.cut(lines, vocabulary, 2)
    assert split.owner == [0, 0, 0, 1]
    assert torch.cat(split.chars).tolist() == [vocabulary.get(char, 1) for char in "人民在北京好"]
    assert [demo.LABELS[i] for i in torch.cat(split.labels)] == lines[0].labels + lines[1].labels
    chars = [torch.zeros(n, dtype=torch.int64) for n in (3, 9, 1, 40, 3, 7, 2)]
    found = list(demo.batches(chars, 12, torch.Generator().manual_seed(0)))
    assert sorted(i for group in found for i in group) == list(range(7))
    assert all(len(group) == 1 or len(group) * max(len(chars[i]) for i in group) <= 12 for group in found)


def test_demo_forbids_what_no_piece_has_and_shows_entities(demo: ModuleType) -> None:
    paths = demo.seen_paths(demo.Split([], [], [torch.tensor([0, 3, 3]), torch.tensor([2])], []))
    assert [(scores == 0).nonzero().tolist() for scores in paths] == [[[0, 3], [3, 3]], [[0], [2]], [[2], [3]]]
    assert set(torch.cat([scores.flatten() for scores in paths]).tolist()) == {0.0, -torch.inf}
    labels = ["S|B-nr", "B|I-nr", "E|I-nr", "S|O", "B|B-ns", "E|I-ns"]
    assert demo.show("江泽民在北京", labels, False) == "[江 泽民]person 在 [北京]place"
    assert demo.show("江泽民在北京", labels, True) == "\033[1;31m江 泽民\033[0m 在 \033[1;32m北京\033[0m"
