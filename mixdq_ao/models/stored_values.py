"""Checks that quantization can produce the values of a quantized weight read from disk."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize.tensor import MixDQTensor, SplitMixDQTensor


def check_values(weight: Tensor) -> None:
    """Raises ValueError naming the stored tensor with an impossible value. Tensors of other classes, and weights on the
    meta device, pass."""
    if isinstance(weight, SplitMixDQTensor):
        check_values(weight.first)
        check_values(weight.second)
    if not isinstance(weight, MixDQTensor) or weight.is_meta:
        return
    for name in ("scale", "act_scale", "act_inv_scale"):
        found = getattr(weight, name)
        _expect(found is None or bool((found > 0).all() and found.isfinite().all()), name, "positive numbers")
    for name in ("bos_embedding", "bos_output"):
        found = getattr(weight, name)
        _expect(found is None or bool(found.isfinite().all()), name, "finite numbers")
    scale, inverse, zero = weight.act_scale, weight.act_inv_scale, weight.act_zero_point
    if scale is not None and inverse is not None:
        near = abs(scale.item() * inverse.item() - 1) <= 2 * torch.finfo(torch.float32).eps
        _expect(near, "act_inv_scale", "one over act_scale")
    if zero is not None and weight.act_levels is not None:
        _expect(0 <= int(zero) <= weight.act_levels, "act_zero_point", f"a code from 0 to {weight.act_levels}")
    if weight.weight_zero_point is not None:
        within = (weight.weight_zero_point >= 0) & (weight.weight_zero_point < 2**weight.bits)
        _expect(bool(within.all()), "weight_zero_point", f"codes from 0 to {2**weight.bits - 1}")


def _expect(good: bool, name: str, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} holds other values than expected: {expected}")
