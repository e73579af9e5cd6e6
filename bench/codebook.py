"""Nearest codes: the search of VQ-VAE and its kin, against faiss and what one writes in torch."""

from typing import Any

import torch
from _runner import Call, Mode, Provider, Room, Tensors, Work, Workload, ours, serving
from torch import Tensor

from pyseq import ops

WORKLOADS = (
    Workload("call", {"N": 16, "K": 512, "D": 64}),  # what a call costs
    Workload("vqvae", {"N": 65536, "K": 1024, "D": 64}),  # a batch of images
    Workload("small", {"N": 8192, "K": 512, "D": 64}, quick=True),
    Workload("vqgan", {"N": 16384, "K": 8192, "D": 256}),
    Workload("factorised", {"N": 16384, "K": 16384, "D": 8}),  # projected to few dimensions
    Workload("tiny", {"N": 65536, "K": 1024, "D": 4}, quick=True),
)


def inputs(workload: Workload, device: str) -> Tensors:
    n, count, dim = workload.sizes.values()
    random = torch.Generator().manual_seed(0)
    x, codes = torch.randn(n, dim, generator=random), torch.randn(count, dim, generator=random)
    return {"x": x.to(device), "codebook": codes.to(device)}


def distance(x: Tensors, indices: Any) -> Tensors:
    """Of what was chosen, in float64, for near ties are no errors."""
    chosen = x["codebook"][torch.as_tensor(indices).to(x["x"].device).view(-1)]
    return {"distance": (x["x"] - chosen).square().sum(1)}


def true_distance(x: Tensors) -> Tensors:
    return distance(x, ops.nearest_code(x["x"], x["codebook"], backend="reference")[0])


def plain(x: Tensors) -> Tensor:
    return torch.cat([torch.cdist(rows, x["codebook"]).argmin(1) for rows in x["x"].split(1024)])


def work(x: Tensors) -> Work:
    """A product of all rows and codes; rows and codes read, an index and a distance written."""
    (n, dim), count = x["x"].shape, len(x["codebook"])
    return Work(units=n, fmas=n * count * dim, bytes=4 * (n + count) * dim + 12 * n)


def pyseq_search(x: Tensors) -> Call:
    serving(ops.nearest_code, x["x"], x["codebook"])
    return lambda: ops.nearest_code(x["x"], x["codebook"])[0]


def cdist(x: Tensors) -> Call:
    return lambda: torch.cdist(x["x"], x["codebook"]).argmin(1)


def addmm(x: Tensors) -> Call:
    """|c|^2 - 2 x . c, whose least is the same."""
    rows, codes = x["x"], x["codebook"]
    return lambda: torch.addmm(codes.square().sum(1), rows, codes.t(), alpha=-2).argmin(1)


def faiss(x: Tensors) -> Call:
    """An index that is built once."""
    import faiss as library

    library.omp_set_num_threads(torch.get_num_threads())
    index = library.IndexFlatL2(x["codebook"].size(1))
    index.add(x["codebook"].numpy())
    rows = x["x"].numpy()
    return lambda: index.search(rows, 1)[1]


SEARCH = {"search": pyseq_search}

ROOM = Room(
    workloads=WORKLOADS,
    inputs=inputs,
    modes=(Mode("search", true_distance, plain, work, distance),),
    providers=(
        Provider("faiss", "faiss-cpu", {"search": faiss}),
        Provider("cdist + argmin", "torch", {"search": cdist}),
        Provider("addmm + argmin", "torch", {"search": addmm}),
        *ours(SEARCH),
        *ours(SEARCH, "cpp", variant=" (AVX2)", level=3),
    ),
    unit="vectors",
    baseline="faiss",
    headlines={"`ops.nearest_code`": ("search", "vqvae")},
    objection="faiss keeps its index between calls, where pyseq packs the codes at every call, as training needs; both "
    "rivals lean on a matrix product that is slower on AMD than on Intel.",
)
