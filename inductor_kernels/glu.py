"""Gated products on a GPU: a program computes values and their gates, and writes what is left of both.

    value, gate = linear(...).chunk(2, -1); value * f(gate)   ->   linear_glu(..., f)

with f GELU, its tanh form or SiLU, where nothing else reads the product. What it made is twice as wide as what comes
of it and, in SDXL, the largest tensor between two kernels; the quantize behind it then fuses into the product too.
"""

import math
import operator
from typing import Any

import torch

from . import compat
from .compat import CallFunction, KeywordArg, ops
from .patterns import convert, linear

OPS = torch.ops.inductor_kernels
aten = torch.ops.aten


def activation(name: str, x):
    """GELU, its tanh form or SiLU of a float32 value in Inductor's ``ops``, as templates/dequantize.jinja has them."""
    if name == "silu":
        return ops.mul(x, ops.sigmoid(x))
    constant = lambda value: ops.constant(value, torch.float32)  # noqa: E731
    if name == "gelu":
        erf = ops.erf(ops.mul(x, constant(math.sqrt(0.5))))
        return ops.mul(ops.mul(x, constant(0.5)), ops.add(erf, constant(1.0)))
    cubed = ops.mul(ops.mul(ops.mul(x, x), x), constant(0.044715))
    return ops.mul(x, ops.sigmoid(ops.mul(ops.add(x, cubed), constant(2 * math.sqrt(2 / math.pi)))))


def _register(name: str, of: Any, readers: int, capability: int) -> None:
    """``of``: the pattern of an activation of a pattern that it reads ``readers`` times, in float32 where results have
    16 bits."""

    def gates(match: Any, *product: Any, size: int, dim: int, dtype=None) -> bool:
        y, weight = match.output_node().meta["val"], product[1].meta["val"]
        in_halves = dim in (-1, y.ndim - 1) and 2 * size == weight.shape[0] and y.dtype == product[-1]
        return in_halves and (compat.triton_device(y.device) or 0) >= capability

    def gate(match: Any, *product: Any, size: int, dim: int, dtype=None) -> None:
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
    """``capability``: the least of a GPU that has kernels."""
    for name, (of, readers) in compat.activation_patterns().items():
        _register(name, of, readers, capability)
