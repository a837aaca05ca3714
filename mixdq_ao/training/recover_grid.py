"""Differentiable rounding: of a weight, with trainable scales of its rows, and of an input, with a trainable range.

The gradient of a rounded value is passed on to the value inside the range (straight-through, arXiv 1308.3432); those of
scales and ranges follow arXiv 1902.08153 (equation 3) and arXiv 2004.09576.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..quantize.quantizer import ActQuant, act_params, fake_quantize_act


class _RoundedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, lowest: int, highest: int) -> Tensor:
        ctx.save_for_backward(weight, scale, zero)
        ctx.ends = lowest, highest
        codes = (weight / scale).round_().add_(zero).clamp_(lowest, highest)
        return codes.sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        weight, scale, zero = ctx.saved_tensors
        lowest, highest = ctx.ends
        exact = weight / scale
        codes = exact.round().add_(zero)
        above, below = codes > highest, codes < lowest
        # outside the range only gradients that move the weight back pass: further out its rounded value is constant
        gw = g.masked_fill((above & (g < 0)) | (below & (g > 0)), 0) if ctx.needs_input_grad[0] else None
        gs = None
        if ctx.needs_input_grad[1]:
            values = codes.clamp_(lowest, highest).sub_(zero)
            change = values.sub_(exact.masked_fill_(above | below, 0))
            gs = change.mul_(g).sum_to_size(scale.shape)
        return gw, gs, None, None, None


class _RoundedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, act: ActQuant) -> Tensor:
        ctx.save_for_backward(x)
        ctx.act = act
        return fake_quantize_act(x, act)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        (x,) = ctx.saved_tensors
        act: ActQuant = ctx.act
        exact = x.float() * act.inv_scale + act.zero_point
        codes = exact.round()
        above, below = codes > act.levels, codes < 0
        outside = above | below
        gx = g.masked_fill(outside, 0) if ctx.needs_input_grad[0] else None
        wide = g.float()
        # inside: x_q = s round(x / s), s = (hi - lo) / levels; outside: x_q is the end itself
        inside = ((codes - exact).masked_fill_(outside, 0) * wide).sum() / act.levels
        lo, hi = (wide * below).sum() - inside, (wide * above).sum() + inside
        return gx, torch.stack([lo, hi]), None


def weight_on_grid(weight: Tensor, scale: Tensor, zero: Tensor, lowest: int, highest: int) -> Tensor:
    """scale * (clamp(round(weight / scale) + zero) - zero), for float32 weight [N, ...] and scale, zero [N, 1...]."""
    return cast(Tensor, _RoundedWeight.apply(weight, scale, zero, lowest, highest))


def rounded_input(x: Tensor, ends: Tensor, bits: int) -> Tensor:
    """``x`` of any shape, rounded in the range ``ends`` [2] (lo, hi)."""
    lo, hi = ends.tolist()
    return cast(Tensor, _RoundedInput.apply(x, ends, act_params(lo, hi, bits)))
