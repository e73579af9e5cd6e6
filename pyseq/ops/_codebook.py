"""The raw op of the codebook room."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyseq.kernels.codebook import Search
from pyseq.ops._backend import Backends
from pyseq.ops._check import wide
from pyseq.ops._library import Raw
from pyseq.reference import codebook as reference


class Options(NamedTuple):
    cosine: bool
    backend: str


BACKENDS = Backends("codebook", Search, {"cpu": ("cpp", "numba"), "cuda": ("triton",)})


def nearest(search: Search, cosine: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Indices and distance (N, H)."""
    with torch.no_grad():
        search = Search(*(x if x is None else x.detach() for x in search))
        direct, _, chosen = BACKENDS.way(backend, search)
        options = Options(cosine, chosen)
        return _by_reference(search, options) if chosen == "reference" else _nearest(search, options, direct)


def _by_reference(search: Search, options: Options) -> tuple[Tensor, Tensor]:
    indices, distance = reference.nearest_code(search.x, search.codebook, search.mask, options.cosine)
    return indices, distance.to(wide(search.x))


def _fake(search: Search, options: Options) -> tuple[Tensor, Tensor]:
    shape = search.x.shape[:2]
    return search.x.new_empty(shape, dtype=torch.int64), search.x.new_empty(shape, dtype=wide(search.x))


def _kernel(search: Search, options: Options) -> tuple[Tensor, Tensor]:
    if options.backend == "reference":
        return _by_reference(search, options)
    indices, distance = _fake(search, options)
    _nearest.launch("nearest", search, options.backend, options.cosine, indices, distance)
    return indices, distance


_nearest = Raw("nearest_code", Search, Options, _kernel, _fake, BACKENDS, returns=2)
