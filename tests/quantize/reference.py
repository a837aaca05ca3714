"""A reference implementation of the numerics: plain float64 formulas and loops."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def round_row(row: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, float]:
    """Signed integers and scale of one output channel (float32 scale, as it is stored)."""
    row = row.astype(np.float64)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = np.float32(np.float32(np.abs(row).max()) / np.float32(top)) or np.float32(1)
        return np.clip(np.rint(np.float32(row) / scale), -top, top), float(scale)
    lo, hi, top = np.float32(min(row.min(), 0)), np.float32(max(row.max(), 0)), np.float32(2**bits - 1)
    scale = np.float32(hi / top - lo / top) or np.float32(1)
    zero = np.rint(-lo / scale)
    return np.clip(np.rint(np.float32(row) / scale) + zero, 0, top) - zero, float(scale)


def round_weight(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Integers shaped like the weight, and scales [N], both float64."""
    rows = [round_row(row.numpy(), bits, symmetric) for row in weight.float().flatten(1)]
    integers = torch.from_numpy(np.stack([r for r, _ in rows])).double().view(weight.shape)
    return integers, torch.tensor([s for _, s in rows], dtype=torch.float64)


def round_act(x: Tensor, lo: float, hi: float, bits: int) -> Tensor:
    """The values of x's codes, float64. Codes are computed in float32 arithmetic."""
    lo, hi, top = min(lo, 0.0), max(hi, 0.0), 2**bits - 1
    scale = np.float32((hi - lo) / top) or np.float32(1)
    zero = min(max(round(-lo / float(scale)), 0), top)
    codes = np.clip(np.rint(x.float().numpy() * np.float32(1 / float(scale)) + np.float32(zero)), 0, top)
    return torch.from_numpy((codes.astype(np.float64) - zero) * float(scale))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, bits: int, symmetric: bool, act=None) -> Tensor:
    """The output of a quantized linear layer, float64; act: (lo, hi, bits) or None."""
    integers, scale = round_weight(weight, bits, symmetric)
    x = x.double() if act is None else round_act(x, *act)
    return F.linear(x, integers * scale[:, None], None if bias is None else bias.double())


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, bits: int, symmetric: bool, act=None, **geometry) -> Tensor:
    """The output of a quantized convolution, float64."""
    integers, scale = round_weight(weight, bits, symmetric)
    x = x.double() if act is None else round_act(x, *act)
    return F.conv2d(x, integers * scale[:, None, None, None], None if bias is None else bias.double(), **geometry)


def assert_close(y: Tensor, reference: Tensor, terms: int, factor: torch.dtype = torch.float32) -> None:
    """Within rounding: every one of ``terms`` products and sums may err by half a unit of float32 of the largest
    magnitude, or of the type that a factor was rounded to, plus one rounding to y's own type."""
    magnitude = reference.abs().amax().item() + 1e-30
    unit = max(torch.finfo(torch.float32).eps, torch.finfo(factor).eps)
    budget = magnitude * (unit * terms**0.5 + torch.finfo(y.dtype).eps)
    error = (y.double() - reference).abs().amax().item()
    assert y.shape == reference.shape
    assert error <= budget, f"error {error:.3g} exceeds {budget:.3g} at magnitude {magnitude:.3g}"
