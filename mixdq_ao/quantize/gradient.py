"""Gradients through products of quantized weights, for training around them: adapters, biases, norms, prompts.

The input's gradient is that of the dequantized layer with an unrounded input (straight through, Bengio et al. 2013,
arXiv 1308.3432), the same as with ``mode="fake"``. The weight gets no gradient. Backward saves nothing but the weight
and multiplies with its integers, in the gradient's type:

    linear   grad_x = (grad_y scale) @ w      conv2d   the transposed convolution      grad_bias = sum of grad_y
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .quantizer import scaled

Product = Callable[[Tensor, Tensor | None], Tensor]
Factors = Callable[[], tuple[Tensor, Tensor]]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, product: Product, factors: Factors, geometry: Sequence[Any]
    ) -> Tensor:
        ctx.factors, ctx.geometry, ctx.shape = factors, geometry, x.shape
        return product(x, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        of_x = of_bias = None
        if ctx.needs_input_grad[1]:
            of_bias = g.sum((0, 2, 3)) if ctx.geometry else g.reshape(-1, g.shape[-1]).sum(0)
        if ctx.needs_input_grad[0]:
            g, weight = _factors(g, *ctx.factors())
            of_x = _of_image(g, weight, ctx.shape, *ctx.geometry) if ctx.geometry else g @ weight
        return of_x, of_bias, None, None, None


def _factors(g: Tensor, integers: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``g`` and the weight, in ``g``'s type, with the scale multiplied into one of them: into ``g``, which is smaller
    and leaves the integers exact, but into the weight for float16, whose range might not hold the scaled ``g``."""
    if g.dtype == torch.float16:
        return g, scaled(integers, scale).to(g.dtype)
    inner = [1] * (integers.dim() - 2)  # of an image [B, O, H, W]
    return (g * scale.view(-1, *inner)).to(g.dtype), integers.to(g.dtype)


def _of_image(
    g: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of an image [B, C, H, W] (``shape``) whose convolution got the gradient ``g`` [B, O, H', W']."""
    x = g.new_empty(1).expand(shape)  # a required argument, of which only the shape is used
    wanted = [True, False, False]
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
    )[0]


def differentiable(
    product: Product, factors: Factors, x: Tensor, bias: Tensor | None = None, geometry: Sequence[Any] = ()
) -> Tensor:
    """``product(x, bias)``, recorded for backward where x or bias requires a gradient.

    Args:
        product: the integer product; autograd does not record its operators.
        factors: returns the weight as int8 integers, [N, K] or [O, C / groups, kh, kw], and their float32 scale [N].
        x: [..., K]; with a geometry [B, C, H, W].
        geometry: stride, padding, dilation (two numbers each) and groups of a convolution; empty for linear.
    """
    asked = x.requires_grad or (bias is not None and bias.requires_grad)
    if not (asked and torch.is_grad_enabled()):
        return product(x, bias)
    return cast(Tensor, _Differentiable.apply(x, bias, product, factors, geometry))
