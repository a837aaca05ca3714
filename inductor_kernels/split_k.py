"""Split-K: the sums of several programs that share one reduction, and the epilogue that follows them.

A product with few rows and a long reduction has too few tiles for all processors of a GPU. Where the machine model says
that it pays (:func:`inductor_kernels.tuned.way`), several programs compute each tile. Each takes a share of the
reduction and writes its int32 sums. Pointwise code adds the shares, exactly, and applies the epilogue of an undivided
product; Inductor fuses it into the readers of the result.
"""

from collections.abc import Sequence

import sympy
import torch

from . import compat, glu
from .compat import Node, Size, Value, ops

LEFT = ("SCALE", "WSUM", "ROW", "BIAS")  # arguments that the epilogue reads instead of the template


def finish(
    sums: Node, shares: int, size: Sequence[Size], dtype: torch.dtype, gate: str = "none",
    *, SCALE: Node, WSUM: Node, ZP: Node, ROW: Node | None = None, BIAS: Node | None = None,
) -> Node:  # fmt: skip
    """The product [..., columns] of shape ``size``: the int32 ``sums`` [shares, ..., N] added up and dequantized as in
    templates/dequantize.jinja. ``gate``: the activation of ``linear_glu``, whose result has N / 2 columns."""
    part, scale, weight_sum, zero_point = map(compat.loader, (sums, SCALE, WSUM, ZP))
    row, bias = (None if node is None else compat.loader(node) for node in (ROW, BIAS))

    def column_of(rows: list[sympy.Expr], column: sympy.Expr) -> Value:
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

    def element(index: Sequence[sympy.Expr]) -> Value:
        *rows, column = index
        y = column_of(rows, column)
        if gate != "none":
            y = ops.mul(y, glu.activation(gate, column_of(rows, column + size[-1])))
        return ops.to_dtype(y, dtype)

    return compat.pointwise(sums.get_device_or_error(), dtype, element, size)
