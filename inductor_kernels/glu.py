"""Gated products on a GPU: one program computes a tile of values and of their gates, and writes only the result.

    value, gate = linear(...).chunk(2, -1); value * f(gate)   ->   linear_glu(..., f)

with f GELU, its tanh form or SiLU, where nothing else reads the product. The unfused product is twice as wide as the
result and, in SDXL, the largest tensor between two kernels. The quantize behind it fuses into the product as well.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from . import compat
from .compat import CallFunction, KeywordArg, Match, PatternExpr, Value, ops
from .patterns import convert, linear

OPS = torch.ops.inductor_kernels
aten = torch.ops.aten


def activation(name: str, x: Value) -> Value:
    """GELU, its tanh form or SiLU of a float32 value in Inductor's ``ops``; templates/dequantize.jinja has them as
    Triton code."""
    if name == "silu":
        return ops.mul(x, ops.sigmoid(x))
    constant = functools.partial(ops.constant, dtype=torch.float32)
    if name == "gelu":
        erf = ops.erf(ops.mul(x, constant(math.sqrt(0.5))))
        return ops.mul(ops.mul(x, constant(0.5)), ops.add(erf, constant(1.0)))
    cubed = ops.mul(ops.mul(ops.mul(x, x), x), constant(0.044715))
    return ops.mul(x, ops.sigmoid(ops.mul(ops.add(x, cubed), constant(2 * math.sqrt(2 / math.pi)))))


def _register(name: str, of: Callable[[PatternExpr], CallFunction], readers: int, capability: int) -> None:
    """``of``: from the pattern of an argument, which ``readers`` nodes read, to that of the activation. 16-bit results
    are converted to float32 for it and back."""

    def gates(match: Match, *product: Any, size: int, dim: int, dtype: torch.dtype | None = None) -> bool:
        y, weight = match.output_node().meta["val"], product[1].meta["val"]
        in_halves = dim in (-1, y.ndim - 1) and 2 * size == weight.shape[0] and y.dtype == product[-1]
        return in_halves and (compat.triton_device(y.device) or 0) >= capability

    def gate(match: Match, *product: Any, size: int, dim: int, dtype: torch.dtype | None = None) -> None:
        compat.replace_output(match, OPS.linear_glu.default, (*product, name))

    for wide in (True, False):
        halves = CallFunction(aten.split.Tensor, linear(), KeywordArg("size"), KeywordArg("dim"), _users=2)
        value = CallFunction(operator.getitem, halves, 0)
        if wide:
            read = CallFunction(convert, CallFunction(operator.getitem, halves, 1), torch.float32, _users=readers)
            activated = CallFunction(convert, of(read), KeywordArg("dtype"))
        else:
            activated = of(CallFunction(operator.getitem, halves, 1, _users=readers))
        for factors in ((value, activated), (activated, value)):
            compat.rewrite(CallFunction(aten.mul.Tensor, *factors), gates, gate, stage=1)


def register(capability: int) -> None:
    """``capability``: the lowest compute capability for which templates are generated."""
    for name, (of, readers) in compat.activation_patterns().items():
        _register(name, of, readers, capability)
