"""Linear chains: samples and entropy of p(y|x), the distribution over tag paths. Arguments as in chain.py."""

import torch
from torch import Tensor

from pyseq.kernels.chain import ENTROPY, Chain, Sampling
from pyseq.ops import _chain, _check
from pyseq.ops._backend import Backend
from pyseq.ops.chain import _checked


@_chain.SAMPLE.op
def crf_sample(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Independent samples of tag paths, each with its probability exp(score) / Z.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), start and end: (K,),
    of any float dtype, float64 only beside float64 emissions; no start or end means zeros.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
    allowed: (B, T, K) bool, the tags that a live step may have; None means every tag.
    num_samples: N, at least 1. generator: of random numbers, on any device; None means torch's own for the device.
    Returns tags (B, N, T) int64; -1 at absent steps, and where no path is feasible or a score is NaN. One 64-bit seed
    is drawn, and every random number hashed from it with row, sample and live step: neither thread count nor backend
    changes a sample, but where a backend's rounding of a probability, about 1e-13, decides. Not differentiable.
    Raises ValueError for a wrong shape or device, for mask beside lengths, for a length out of range (on the CPU in
    eager mode or with PYSEQ_CHECK=1; elsewhere its samples become -1), for num_samples below 1 and for a backend that
    cannot serve; TypeError for a wrong dtype, something that is no dense tensor, or num_samples that is no integer.
    Time O(B T K^2 + B N T log K), with K for log K in Triton, which serves CUDA; memory O(B N T + B T K), O(B N T K) in
    the reference. Source: forward filtering, backward sampling (Scott 2002, section 2).

    >>> generator = torch.Generator().manual_seed(0)
    >>> emissions = torch.tensor([[[0.0, 0.0], [0.0, -torch.inf]]])
    >>> ops.crf_sample(emissions, torch.zeros(2, 2), num_samples=3, generator=generator)[..., 1]
    tensor([[0, 0, 0]])
    """
    _check.positive("num_samples", num_samples)
    if generator is not None and not isinstance(generator, torch.Generator):
        mend = "for a seed torch.Generator().manual_seed(...)"
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}; {mend}")
    chain = _checked(Chain(emissions, transitions, start, end, None, mask, lengths), allowed=allowed)
    device = chain.emissions.device if generator is None else generator.device
    bounds = torch.iinfo(torch.int64)
    seed = torch.randint(bounds.min, bounds.max, (1,), generator=generator, device=device).to(chain.emissions.device)
    with torch.no_grad():
        return _chain.samples(Sampling(*chain[:4], chain.mask, chain.lengths, seed), num_samples, backend)


@_chain.BACKENDS.op
def crf_entropy(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Entropy of p(y|x), the distribution over tag paths.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), start and end: (K,),
    of any float dtype, float64 only beside float64 emissions; no start or end means zeros.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
    allowed: (B, T, K) bool, the tags that a live step may have; None means every tag.
    Returns (B,) in nats, float64 for float64 emissions, else float32; at least 0, and 0 for empty sequences and where
    no path is feasible. Computed in float64 as a sum of terms of one sign, so small entropies keep their digits.
    Differentiable, also twice, in emissions, transitions, start and end.
    Raises ValueError for a wrong shape or device, for mask beside lengths, for a length out of range (on the CPU in
    eager mode or with PYSEQ_CHECK=1; elsewhere its entropy becomes NaN) and for a backend that cannot serve; TypeError
    for a wrong dtype or something that is no dense tensor.
    Gradients come with the value, in one more sweep; second derivatives by the reference. Time O(B T K^2), memory
    O(B T K), in the reference with gradients O(B T K^2). Source: Hernando, Crespi and Cybenko 2005.

    >>> ops.crf_entropy(torch.zeros(1, 2, 3), torch.zeros(3, 3)).exp()  # nine paths alike
    tensor([9.])
    """
    chain = _checked(Chain(emissions, transitions, start, end, None, mask, lengths), allowed=allowed)
    return _chain.value(chain, ENTROPY, "none", backend)
