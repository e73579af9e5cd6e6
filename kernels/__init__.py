"""Launchers and compiled kernels: no autograd, no validation. Installed as `pyseq.kernels`."""

if __name__ != "pyseq.kernels":
    raise ImportError("kernels/ is the source folder of pyseq.kernels; install pyseq and import pyseq.kernels instead")
