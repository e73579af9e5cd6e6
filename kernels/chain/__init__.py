"""Kernels of the chain room: forward-backward and Viterbi of linear chains."""
