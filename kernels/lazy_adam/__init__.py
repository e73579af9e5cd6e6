"""Kernels of the lazy_adam room: Adam for the rows of tables that a step has seen, in place.

Launcher: `update(tables, decay, row_bias, maximize, dense)`; contiguous tensors, else nothing is touched. Answers
BAD_ROW, and has touched nothing, where an index is no row's.
"""

from typing import NamedTuple

from torch import Tensor

BAD_ROW = 1  # status
CHUNK = 512  # gradients of a row that are added up together, in float64; then chunks, in order


class Tables(NamedTuple):
    """Lists of as many tensors, one a table of V rows and D elements; those that are not needed are empty lists.

    hyper: (5,) float64 on the tables' device: lr, beta1, beta2, eps, weight_decay.
    """

    params: list[Tensor]  # (V, D) float32, float64 or bfloat16
    exp_avg: list[Tensor]  # (V, D) float64 beside float64, else float32 or bfloat16
    exp_avg_sq: list[Tensor]  # as exp_avg
    max_exp_avg_sq: list[Tensor]  # as exp_avg; with amsgrad
    last: list[Tensor]  # (V,) int32: the step that saw a row last, 0 for none; with decay
    touches: list[Tensor]  # (V,) int32: how many steps saw a row; for row_bias, or where they are to be counted
    indices: list[Tensor]  # (n,) int64, in any order, any of them twice; none where gradients are dense
    values: list[Tensor]  # (n, D), or (V, D) where gradients are dense; of the dtype of params or float32
    steps: list[Tensor]  # () float32: the number of this step, from 1
    seeds: list[Tensor]  # () int64: of stochastic rounding; beside bfloat16 params or averages
    hyper: Tensor
