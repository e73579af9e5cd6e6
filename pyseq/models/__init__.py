"""Models built on pyseq's layers."""

from pyseq.models.pixel_attention import PixelAttention as PixelAttention
from pyseq.models.pixel_cnn import PixelCNN as PixelCNN
from pyseq.models.tagger import SequenceTagger as SequenceTagger
from pyseq.models.vqvae import VQVAE as VQVAE
from pyseq.models.vqvae import VQVAEOutput as VQVAEOutput

__all__ = ["VQVAE", "PixelAttention", "PixelCNN", "SequenceTagger", "VQVAEOutput"]
