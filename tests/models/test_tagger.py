import importlib
import importlib.util
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
DEMO = Path(__file__).parents[2] / "examples" / "people_daily_tagger.py"
both = pytest.mark.parametrize("head", HEADS)


def tagger(head: Head = "crf", layers: int = 1, dropout: float = 0.0) -> SequenceTagger:
    torch.manual_seed(0)
    model = SequenceTagger(CHARS, TAGS, embedding=6, hidden=4, layers=layers, dropout=dropout, head=head)
    return model.double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    chars = torch.randint(CHARS, (4, 7), generator=generator)
    tags = torch.randint(TAGS, (4, 7), generator=generator)
    return chars, tags, torch.arange(7) < LENGTHS.unsqueeze(1)


@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_is_a_bidirectional_lstm_on_packed_sequences(layers: int) -> None:
    model, (chars, _, mask) = tagger(layers=layers), batch()
    peer = nn.LSTM(6, 4, num_layers=layers, bidirectional=True, batch_first=True).double()
    for i in range(layers):
        for suffix, part in (("", model.forwards[i]), ("_reverse", model.backwards[i])):
            for name, value in part.named_parameters():
                getattr(peer, name.replace("l0", f"l{i}") + suffix).data.copy_(value)
    packed = pack_padded_sequence(model.embedding(chars), LENGTHS, batch_first=True, enforce_sorted=False)
    wanted = model.project(pad_packed_sequence(peer(packed)[0], batch_first=True)[0])
    torch.testing.assert_close(model(chars, mask)[mask], wanted[mask])


@both
def test_padding_is_not_used(head: Head) -> None:
    model, (chars, tags, mask) = tagger(head), batch()
    loss, path = model.loss(chars, tags, mask), model.decode(chars, mask)
    wide = torch.arange(9) < LENGTHS.unsqueeze(1)
    other_chars = torch.full((4, 9), CHARS - 1).masked_scatter(wide, chars[mask])
    other_tags = torch.full((4, 9), -100).masked_scatter(wide, tags[mask])
    torch.testing.assert_close(model.loss(other_chars, other_tags, wide), loss)
    assert torch.equal(model.decode(other_chars, wide)[:, :7], path)
    assert torch.equal(path == -1, ~mask)


@both
def test_no_mask_means_all_live(head: Head) -> None:
    model, (chars, tags, _) = tagger(head), batch()
    everything = torch.ones_like(chars, dtype=torch.bool)
    torch.testing.assert_close(model.loss(chars, tags), model.loss(chars, tags, everything))
    assert torch.equal(model.decode(chars), model.decode(chars, everything))


def test_crf_head_is_the_reference_chain() -> None:
    model, (chars, tags, mask) = tagger(), batch()
    assert model.crf is not None
    emissions, start, end = model(chars, mask), model.crf.start_transitions, model.crf.end_transitions
    nll = reference.crf_nll(emissions, model.crf.transitions, tags, start, end, mask)
    torch.testing.assert_close(model.loss(chars, tags, mask), nll.sum() / LENGTHS.sum())
    _, path = reference.viterbi(emissions, model.crf.transitions, start, end, mask)
    assert torch.equal(model.decode(chars, mask), path)


def test_softmax_head_is_independent_at_each_step() -> None:
    model, (chars, tags, mask) = tagger("softmax"), batch()
    scores = model(chars, mask).log_softmax(2)
    wanted = -scores.gather(2, tags.unsqueeze(2)).squeeze(2)[mask].mean()
    torch.testing.assert_close(model.loss(chars, tags, mask), wanted)
    assert torch.equal(model.decode(chars, mask)[mask], scores.argmax(2)[mask])


def test_forbidden_transition_is_never_decoded() -> None:
    model, (chars, _, mask) = tagger(), batch()
    assert model.crf is not None
    with torch.no_grad():
        model.project.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0]))
        assert (model.decode(chars, mask)[0] == 3).all()
        model.crf.transitions[3, 3] = -torch.inf
    path = model.decode(chars, mask)[0]
    assert (path == 3).any()
    assert not ((path[1:] == 3) & (path[:-1] == 3)).any()


@both
def test_row_without_live_steps_counts_for_nothing(head: Head) -> None:
    model, (chars, tags, mask) = tagger(head), batch()
    loss = model.loss(chars, tags, mask)
    more = [torch.cat((x, torch.zeros_like(x[:1]))) for x in (chars, tags, mask)]
    torch.testing.assert_close(model.loss(*more), loss)
    assert (model.decode(more[0], more[2])[-1] == -1).all()


@both
def test_overfits_a_handful(head: Head) -> None:
    model, (chars, tags, mask) = tagger(head), batch()
    optimizer = torch.optim.Adam(model.parameter_groups(0.05, 2.0))
    for _ in range(50):
        loss = model.loss(chars, tags, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(model.decode(chars, mask)[mask], tags[mask])


def test_equal_seeds_give_equal_encoders() -> None:
    crf, softmax = (dict(tagger(head).named_parameters()) for head in HEADS)
    assert set(crf) - set(softmax) == {"crf.transitions", "crf.start_transitions", "crf.end_transitions"}
    assert all(torch.equal(crf[name], value) for name, value in softmax.items())


@both
def test_parameter_groups_hold_every_parameter_once(head: Head) -> None:
    model = tagger(head)
    groups = model.parameter_groups(0.01, 5.0)
    assert [group["lr"] for group in groups] == ([0.01, 0.05] if head == "crf" else [0.01])
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    if model.crf is not None:
        assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.crf.parameters()}


@both
def test_every_method_goes_through_call(head: Head) -> None:
    model, (chars, tags, _), seen = tagger(head), batch(), []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    returned = [model.loss(chars, tags), model.decode(chars), model(chars)]
    assert all(x is y for x, y in zip(returned, seen, strict=True))
    assert torch.equal(model(chars, None, tags, compute="loss"), model.loss(chars, tags))
    with pytest.raises(ValueError, match="compute must be 'emissions', 'loss' or 'decode', got 'nll'"):
        model(chars, compute="nll")
    with pytest.raises(TypeError, match="tags must be a tensor, got NoneType"):
        model(chars, compute="loss")


@both
def test_mask_must_pad_on_the_right(head: Head) -> None:
    model, (chars, tags, mask) = tagger(head), batch()
    with pytest.raises(ValueError, match="pad on the right"):
        model.loss(chars, tags, mask.flip(1))
    with pytest.raises(ValueError, match="pad on the right"):
        model.decode(chars, mask.flip(1))


@both
def test_masks_and_labels_are_checked(head: Head) -> None:
    model, (chars, tags, mask) = tagger(head), batch()
    for wrong in (mask.byte(), mask.float(), mask[:, :1]):
        with pytest.raises(ValueError, match=r"mask must be bool of the shape of chars, \("):
            model.loss(chars, tags, wrong)
    with pytest.raises((ValueError, IndexError), match="-100"):
        model.loss(chars, tags.fill_(-100), mask)


def test_unknown_head_raises() -> None:
    with pytest.raises(ValueError, match="got 'memm'"):
        SequenceTagger(3, 3, head="memm")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    pytest.importorskip("tqdm", reason="the demo shows progress: pip install tqdm")
    spec = importlib.util.spec_from_file_location("people_daily_tagger", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_batches_hold_every_piece_once(demo: ModuleType) -> None:
    chars = [torch.zeros(n, dtype=torch.int64) for n in (3, 9, 1, 40, 3, 7, 2)]
    found = list(demo.batches(chars, 12, torch.Generator().manual_seed(0)))
    assert sorted(i for group in found for i in group) == list(range(7))
    assert all(len(group) == 1 or len(group) * max(len(chars[i]) for i in group) <= 12 for group in found)


def test_demo_cuts_lines_without_loss(demo: ModuleType) -> None:
    lines = [Sentence(("人民", "在", "北京"), ("n", "p", "ns")), Sentence(("好",), ("a",))]
    vocabulary = demo.index([*lines, lines[0]])
    assert sorted(vocabulary.values()) == [2, 3, 4, 5, 6]
    split = demo.cut(lines, vocabulary, 2)
    assert split.owner == [0, 0, 0, 1]
    assert torch.cat(split.chars).tolist() == [vocabulary.get(char, 1) for char in "人民在北京好"]
    assert [demo.LABELS[i] for i in torch.cat(split.labels)] == lines[0].labels + lines[1].labels


def test_demo_forbids_what_no_piece_has(demo: ModuleType) -> None:
    split = demo.Split([], [], [torch.tensor([0, 3, 3]), torch.tensor([2])], [])
    transitions, start, end = demo.seen_paths(split)
    assert {tuple(x) for x in (transitions == 0).nonzero().tolist()} == {(0, 3), (3, 3)}
    assert (start == 0).nonzero().flatten().tolist() == [0, 2]
    assert (end == 0).nonzero().flatten().tolist() == [2, 3]
    assert set(torch.cat((transitions.flatten(), start, end)).tolist()) == {0.0, -torch.inf}


def test_demo_shows_words_and_entities(demo: ModuleType) -> None:
    labels = ["S|B-nr", "B|I-nr", "E|I-nr", "S|O", "B|B-ns", "E|I-ns"]
    assert demo.show("江泽民在北京", labels, False) == "[江 泽民]person 在 [北京]place"
    assert demo.show("江泽民在北京", labels, True) == "\033[1;31m江 泽民\033[0m 在 \033[1;32m北京\033[0m"


def test_study_skips_finished_runs_and_pairs_seeds(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the study draws: pip install matplotlib")
    monkeypatch.syspath_prepend(str(DEMO.parent))
    heads = importlib.import_module("people_daily_heads")
    path = tmp_path / "runs.csv"
    runs = [("crf", 1, 8), ("softmax", 0, 4), (demo.LEGAL, 0, 5), ("crf", 0, 6), ("softmax", 1, 7), (demo.LEGAL, 1, 9)]
    for head, seed, right in runs:
        score = demo.SpanScore(correct=right, predicted=10, gold=10)
        scores = {kind: score for kind in ("all", *demo.ENTITY_TYPES)}
        result = demo.Result(head, {}, score, scores, 2000.0, 3000.0, 1)
        heads.append(path, heads.row(result, seed, demo.FULL, 1))
    rows = heads.read(path, demo.FULL)
    assert {(line["head"], line["seed"]) for line in rows} == {(h, s) for h in (*demo.HEADS, demo.LEGAL) for s in "01"}
    assert heads.read(path, demo.QUICK) == []
    assert heads.values(rows, "softmax", "entity_f1") == [0.4, 0.7]
    line = next(line for line in heads.table(rows) if line[0] == "entities, F1")
    assert line[1:4] == ["0.5500 ± 0.2121", "0.7000 ± 0.2828", "0.7000 ± 0.1414"]
    assert line[4:] == ["0.1500 ± 0.0707 (2 of 2)", "0.0000 ± 0.1414 (1 of 2)"]
    assert "| " + " | ".join(line) + " |\n" in heads.page(rows, demo.FULL, "runs")
    heads.plot(rows, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 10_000
