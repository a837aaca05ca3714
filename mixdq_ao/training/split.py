"""Splits a float32 value into a 16-bit float, which the model uses, and a 16-bit remainder, which the optimizer stores.

bfloat16 is the upper half of float32's bits, so the pair holds every float32 value exactly (arXiv 2309.12381):

    visible = (bits + 0x8000) >> 16,  remainder = bits - (visible << 16), always in [-0x8000, 0x7FFF]

This rounds to nearest, ties away from zero. Ties to even would need remainders up to +0x8000, which 16 bits do not
hold: the tie above an even value would be restored one step off (NVIDIA/apex#1842). Edge cases:

- A value of 3.3961775e38 (half a step above bfloat16's largest) or more is visible as infinity, as in any cast to
  bfloat16; the pair is still exact.
- Zeros keep their sign, subnormal values are exact.
- NaN stays NaN; its payload is not kept.

float16 has 5 exponent bits. The remainder counts units of 2^-15 of the visible value's spacing, so the pair is exact
for 2^-16 <= |x| < 65520; below, it is the nearest multiple of 2^-39, off by at most 2^-40 (9.1e-13). The visible value
is torch's cast (ties to even). Values of 65520 and more exceed float16 and become infinite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REMAINDER = {torch.bfloat16: "bfloat16_remainder", torch.float16: "float16_remainder"}
"""{dtype of a parameter with a remainder: name of the remainder in the optimizer's state}. They have different names
because they are not interchangeable."""


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The visible value in ``dtype`` (bfloat16 or float16) and the int16 remainder of a float32 tensor of any shape."""
    return _split_bfloat16(x) if dtype is torch.bfloat16 else _split_float16(x)


def join(visible: Tensor, remainder: Tensor) -> Tensor:
    """The float32 value of a pair.

    Ignores a remainder with which the bits would be a NaN: other code overwrote the visible value, with an infinity for
    example.
    """
    return _join_bfloat16(visible, remainder) if visible.dtype is torch.bfloat16 else _join_float16(visible, remainder)


def fits(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a pair of ``dtype`` can hold all finite values of ``x``."""
    return dtype is not torch.float16 or not bool(((x.abs() >= 65520) & x.isfinite()).any())


def _split_bfloat16(x: Tensor) -> tuple[Tensor, Tensor]:
    bits = x.view(torch.int32)
    visible = (bits + 0x8000).bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)  # exact: lower half zero
    remainder = bits.to(torch.int16)  # keeps the lower half, and as a signed number that is bits - (visible << 16)
    if surely_no_nan(x):
        return visible, remainder
    nan = x.isnan()
    return torch.where(nan, torch.nan, visible), torch.where(nan, 0, remainder)


def _join_bfloat16(visible: Tensor, remainder: Tensor) -> Tensor:
    rounded = visible.to(torch.float32)
    x = (rounded.view(torch.int32) + remainder).view(torch.float32)
    return x if surely_no_nan(x) else torch.where(x.isnan(), rounded, x)


def _split_float16(x: Tensor) -> tuple[Tensor, Tensor]:
    visible = x.to(torch.float16)
    rounded = _nearest_float16(x) if torch.compiler.is_compiling() else visible.to(torch.float32)
    steps = (x - rounded) * _power_of_two(40 - _float16_exponent(rounded))  # the difference is exact (Sterbenz)
    steps = torch.where(rounded.abs() < 65536, steps, 0)
    return visible, steps.round().to(torch.int16)


def _nearest_float16(x: Tensor) -> Tensor:
    """``x.to(float16).to(float32)`` by arithmetic, since Inductor removes a cast to float16 and back.

    Scaling by float16's spacing at ``x`` is exact, and ``round`` takes ties to even. Values of 65520 and more become
    65536 and more instead of infinite.
    """
    exponent = _float16_exponent(x)
    return (x * _power_of_two(25 - exponent)).round() * _power_of_two(exponent - 25)


def _join_float16(visible: Tensor, remainder: Tensor) -> Tensor:
    rounded = visible.to(torch.float32)
    return rounded + remainder.to(torch.float32) * _power_of_two(_float16_exponent(rounded) - 40)


def _float16_exponent(x: Tensor) -> Tensor:
    """The biased float16 exponent e >= 1 of float32 values; the spacing of float16 there is 2^(e - 25)."""
    return (((x.view(torch.int32) >> 23) & 0xFF) - 112).clamp(1, 31)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def surely_no_nan(x: Tensor) -> bool:
    """Whether a cheap check shows that ``x`` has no NaN.

    On a CPU one sum shows it, which saves two passes over the data. False where the check would synchronize with a
    device or break a graph.
    """
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and not math.isnan(x.sum().item())
