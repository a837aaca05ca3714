"""Reductions shared by several programs: what comes after their sums.

A product of few rows and a long reduction has too few tiles for all processors of a GPU. Where the model of the machine
says that it pays (:func:`inductor_kernels.tuned.way`), each tile is computed by several programs, which take a share
of the reduction each and write their sums. Pointwise work adds these, exactly, and does what the epilogue of an
undivided product does; Inductor fuses it into whatever reads the result.
"""

import torch

from . import compat, glu
from .compat import ops

LEFT = ("SCALE", "WSUM", "ROW", "BIAS")  # arguments of a template that wait for the whole sum


def finish(sums, shares: int, size, dtype: torch.dtype, gate: str = "none", *, SCALE, WSUM, ZP, ROW=None, BIAS=None):
    """The product of this ``size``: int32 ``sums`` [shares, ..., N] added up, then as templates/dequantize.jinja.
    ``gate``: of ``linear_glu``, whose result has half as many columns."""
    part, scale, weight_sum, zero_point = (node.make_loader() for node in (sums, SCALE, WSUM, ZP))
    row, bias = (node and node.make_loader() for node in (ROW, BIAS))

    def column_of(rows, column):
        y = part([0, *rows, column])
        for share in range(1, shares):
            y = ops.add(y, part([share, *rows, column]))
        offset = ops.sub(zero_point([]), ops.constant(128, torch.int32))
        y = ops.to_dtype(ops.sub(y, ops.mul(offset, weight_sum([column]))), torch.float32)
        y = ops.mul(y, scale([column]))
        if row:
            y = ops.mul(y, row(rows))
        if bias:
            y = ops.add(y, ops.to_dtype(bias([column]), torch.float32))
        return y

    def element(index):
        *rows, column = index
        y = column_of(rows, column)
        if gate != "none":
            y = ops.mul(y, glu.activation(gate, column_of(rows, column + size[-1])))
        return ops.to_dtype(y, dtype)

    return compat.pointwise(sums.get_device(), dtype, element, size)
