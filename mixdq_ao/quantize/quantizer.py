"""The numerics: conversion of weights and activations to integer codes, used by everything else.

Rounding is to nearest, ties to even, unless a weight's error is compensated. Quantizing an activation multiplies by
a stored reciprocal, never divides, so that eager, compiled C++ and compiled CUDA code give the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from inductor_kernels import ops as _ops  # noqa: F401  (registers torch.ops.inductor_kernels)
from inductor_kernels import reference
from inductor_kernels.checks import FLOATS

from ..errors import QuantizationError
from ..layer_plan import Rounding, WeightRange
from .compensate import Compensation, best_compensated
from .eager import is_eager
from .grid import SMALLEST_SCALE, Grid, best_grid, minmax_grid, shrunk_grids, squared_error
from .heap import give_back_after

STEPS = {"nearest": 32, "compensated": 8}
"""{rounding: number of ranges tried below min-max}. With "compensated" each of them takes a whole rounding."""


@dataclass(frozen=True, slots=True)
class WeightQuant:
    """Per-output-channel weight codes.

    Attributes:
        codes: int8 (8 bit, in [-127, 127]) or uint8 (4 and 2 bit, in [0, 2^bits - 1]), shaped like the weight.
        scale: float32 [N].
        zero_point: int8 [N], or None at 8 bits. The weight is scale * (codes - zero_point).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def integers(self) -> Tensor:
        """codes - zero_point: the signed int8 values that products use."""
        if self.zero_point is None:
            return self.codes
        return self.codes.to(torch.int8) - _rows(self.zero_point, self.codes.dim())

    def dequantize(self) -> Tensor:
        """float32, shaped like the weight."""
        return scaled(self.integers(), self.scale)


def scaled(integers: Tensor, scale: Tensor) -> Tensor:
    """Integers [N, ...] times the scale [N] of their rows, in float32."""
    return integers.to(torch.float32) * _rows(scale, integers.dim())


def _rows(x: Tensor, dim: int) -> Tensor:
    return x.reshape(-1, *[1] * (dim - 1))


def quantize_weight(
    weight: Tensor,
    bits: int,
    *,
    symmetric: bool | None = None,
    weight_range: WeightRange = "minmax",
    rounding: Rounding = "nearest",
    moment: Tensor | None = None,
) -> WeightQuant:
    """Quantizes a weight with a scale per output channel (dimension 0).

    Symmetric: scale = max|w| / (2^(bits-1) - 1). Asymmetric (4 and 2 bit): the range is widened to hold 0,
    scale = (max - min) / (2^bits - 1), zero_point = round(-min / scale), as in section 3 of arXiv 2405.17873.
    A channel of zeros gets scale 1 and codes that mean 0.

    Args:
        weight: [N, ...], any floating dtype; computed in float32.
        bits: 8, 4 or 2.
        symmetric: default true at 8 bits (the only choice there), false at 4 and 2.
        weight_range: "minmax", as above; otherwise per channel that or a narrower range, whichever gives the least
            squared error of the rounded weight ("mse") or, computed from ``moment``, of the layer's output ("output").
        rounding: "nearest", or "compensated" (see ``compensate``).
        moment: float32 [K, K], mean of x x^T over the K inputs each output is a sum over, in the order of
            ``weight.flatten(1)``; needed for "output" and "compensated".

    Raises:
        QuantizationError: bits not offered, an empty weight, NaN or infinity in it, a moment missing or of another
            shape.
    """
    symmetric = bits == 8 if symmetric is None else symmetric
    if bits not in (2, 4, 8) or (bits == 8 and not symmetric):
        raise QuantizationError(f"weight_bits={bits}, symmetric={symmetric}: expected 8 (symmetric), 4 or 2 bits")
    refuse_unusable(weight)
    if not torch.compiler.is_compiling():
        give_back_after(weight)
    rows = weight.detach().to(torch.float32).flatten(1)
    grid = minmax_grid(rows, bits, symmetric)
    if (weight_range, rounding) == ("minmax", "nearest") or rows.is_meta:
        codes = grid.codes(rows)
    else:
        usable = None if moment is None else _usable_moment(moment, rows)
        grid, codes = _searched(rows, grid, bits, symmetric, weight_range, rounding, usable)
    if bits == 8:
        return WeightQuant(codes.to(torch.int8).view(weight.shape), grid.scale, None)
    return WeightQuant(codes.to(torch.uint8).view(weight.shape), grid.scale, grid.zero.to(torch.int8))


def _searched(
    rows: Tensor,
    widest: Grid,
    bits: int,
    symmetric: bool,
    weight_range: WeightRange,
    rounding: Rounding,
    moment: Tensor | None,
) -> tuple[Grid, Tensor]:
    """Grid and codes of ``rows`` for ranges and roundings other than "minmax" with "nearest"."""
    if moment is None and (weight_range == "output" or rounding == "compensated"):
        raise QuantizationError(f"weight_range={weight_range!r}, rounding={rounding!r}: expected a moment of the input")
    grids = shrunk_grids(widest, bits, symmetric, STEPS[rounding if weight_range == "output" else "nearest"])
    nearest = squared_error(rows, widest.scale, moment if weight_range == "output" else None)
    if rounding == "nearest" or moment is None:
        grid = best_grid(grids, nearest)
        return grid, grid.codes(rows)
    if weight_range == "mse":
        widest = best_grid(grids, nearest)
    tried = list(grids) if weight_range == "output" else [widest]
    return best_compensated(rows, tried, Compensation.of(moment), moment, widest.scale)


def _usable_moment(moment: Tensor, rows: Tensor) -> Tensor:
    """``moment`` on the weight's device, with a mean diagonal of 1 so that errors do not overflow float32."""
    if moment.shape != (rows.shape[1], rows.shape[1]):
        raise QuantizationError(f"moment has shape {tuple(moment.shape)}, expected {(rows.shape[1],) * 2}")
    moment = moment.to(rows.device, torch.float32)
    if not bool(torch.isfinite(moment).all()):
        raise QuantizationError("moment has NaN or infinite values, expected a mean of x x^T; collect moments again")
    mean = moment.diagonal().mean()
    return moment / mean if mean > 0 else moment


def refuse_unusable(weight: Tensor) -> None:
    """Raises QuantizationError for a weight that is not plain 16- or 32-bit floating point, has no elements, or holds
    NaN or infinity (not checked while a graph is traced)."""
    if isinstance(weight, TorchAOBaseTensor) or weight.dtype not in FLOATS:
        kind = f"{type(weight).__name__} of {weight.dtype}"
        raise QuantizationError(f"weight is a {kind}, expected plain float32, bfloat16 or float16")
    if weight.numel() == 0:
        raise QuantizationError(f"weight has shape {tuple(weight.shape)}, expected at least one element")
    if torch.compiler.is_compiling() or weight.is_meta:
        return
    bad = ~torch.isfinite(weight.detach())  # detached: isfinite fails on an inference tensor that requires grad
    if bool(bad.any()):
        raise QuantizationError(
            f"weight has {int(bad.sum())} NaN or infinite values (first in output channel "
            f"{int(bad.flatten(1).any(1).nonzero()[0])}); repair the checkpoint or give the layer 16 bits"
        )


@dataclass(frozen=True, slots=True)
class ActQuant:
    """Static per-tensor activation parameters: q = clamp(round(x * inv_scale + zero_point), 0, levels)."""

    scale: float
    inv_scale: float
    zero_point: int
    levels: int


def act_bits(levels: int | None) -> int:
    """Activation bits whose largest code is ``levels``; 16 for None."""
    return 16 if levels is None else levels.bit_length()


def act_params(lo: float, hi: float, bits: int = 8) -> ActQuant:
    """Asymmetric parameters of the range [lo, hi], widened to hold 0 (zero padding must be exact).

    The scale is rounded to float32 before its reciprocal is taken, so that both are the values that tensors hold.
    """
    lo, hi, levels = min(lo, 0.0), max(hi, 0.0), 2**bits - 1
    scale = (hi - lo) / levels
    scale = 1.0 if scale == 0 else max(scale, SMALLEST_SCALE)
    scale = torch.tensor(scale, dtype=torch.float32).item()
    inv = torch.tensor(1.0 / scale, dtype=torch.float32).item()
    return ActQuant(scale, inv, min(max(round(-lo / scale), 0), levels), levels)


def quantize_act(x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """uint8 codes of ``x`` (int8 codes minus 128 on CUDA, whose integer matrix units want signed operands).

    inv_scale: float32 []; zero_point: int32 []. Traced graphs get plain operators, which Inductor fuses into the
    producer of ``x`` as an epilogue; eager mode on a CPU calls one kernel, a single pass over memory.
    """
    if is_eager(x):
        return torch.ops.inductor_kernels.quantize(x, inv_scale, zero_point, levels)
    return reference.quantize(x, inv_scale, zero_point, levels)


def fake_quantize_act(x: Tensor, params: ActQuant) -> Tensor:
    """``x`` quantized and dequantized, in its own dtype."""
    codes = torch.round(x.to(torch.float32) * params.inv_scale + params.zero_point).clamp(0, params.levels)
    return ((codes - params.zero_point) * params.scale).to(x.dtype)
