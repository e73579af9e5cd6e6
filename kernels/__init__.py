"""Launchers and compiled kernels: no autograd, no validation. Installed as `pyseq.kernels`.

A launcher takes its room's inputs (a NamedTuple of tensors), options, and preallocated outputs, and answers a status.
"""

if __name__ != "pyseq.kernels":
    raise ImportError("kernels/ is the source folder of pyseq.kernels; install pyseq and import pyseq.kernels instead")

UNFIT, OK = -1, 0  # a tensor is not as the kernel takes it, and nothing was touched; served. Above 0: a room's own
