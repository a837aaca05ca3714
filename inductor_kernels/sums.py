"""Sums that a CPU's products take along: a residual is added by oneDNN, not by a pass of its own.

    linear(...) + other   ->   linear_add(..., other)     where the product runs in oneDNN's int8 kernels

The quantize of the next layer and activation functions stay with Inductor, which fuses them into the norm or the gate
that stands between SDXL's layers. Convolutions stay as they are: oneDNN adds to theirs only in place.
"""

from typing import Any

import torch

from . import compat, cpu

OPS = torch.ops.inductor_kernels


def _worth(match: Any, *arguments: Any) -> bool:
    """Both are of one shape and type, and the product is large enough for oneDNN."""
    codes, *_, row_scale, bits, dtype, other = arguments
    if not isinstance(other, torch.fx.Node):
        return False
    values: list[Any] = [node.meta["val"] for node in (match.output_node(), codes, other)]
    y, x, z = values
    if y.device.type != "cpu" or compat.config.cpu_backend != "cpp" or row_scale is not None:
        return False
    if z.shape != y.shape or z.dtype != dtype or y.dtype != dtype or not all(type(n) is int for n in x.shape):
        return False
    return cpu.writes(dtype) and cpu.repays_onednn(x.numel() * y.shape[-1], bits)


def _take_along(match, *arguments) -> None:
    *product, row_scale, bits, dtype, other = arguments
    compat.replace_output(match, OPS.linear_add.default, (*product, other, bits, dtype))


compat.replace_sums(OPS.linear.default, 10, _worth, _take_along)
