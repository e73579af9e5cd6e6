"""Models built on pyseq's layers."""

from pyseq.models.tagger import SequenceTagger as SequenceTagger

__all__ = ["SequenceTagger"]
