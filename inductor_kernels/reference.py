"""The operators in plain torch: their specification, and the implementation on devices without a kernel.

Integer sums are accumulated in float64, where they are exact (below 2**53). On CUDA, where float64 may be slow, integer
units accumulate them (:mod:`inductor_kernels.int_mm`), except in grouped convolutions; MPS has no float64 and uses
float32. The argument ``sums`` selects another type: float32 is several times as fast, exact below 2**24 and rounded
above. Weight-only products, whose sums are rounded in any case, use float64 on a CPU and float32 elsewhere, as the GPU
kernels do.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks, int_mm
from .packing import unpack_weight

INTEGER_UNITS = ("cuda",)  # device types on which int_mm runs


def code_dtype(device: torch.device) -> torch.dtype:
    """int8 (codes minus 128) on CUDA, whose integer matrix units want signed operands; else uint8."""
    return torch.int8 if device.type == "cuda" else torch.uint8


def quantize(x: Tensor, inv_scale: Tensor | float, zero_point: Tensor | float, levels: int) -> Tensor:
    """Codes of ``x`` [...]: clamp(round(x * inv_scale + zero_point), 0, levels), minus 128 as int8 on CUDA.

    The reciprocal of the scale is stored, and every implementation multiplies by it, so that their codes are equal.
    These are plain aten operators in float32, which Inductor fuses into the producer of ``x``.
    """
    codes = torch.round(x.to(torch.float32) * inv_scale + zero_point).clamp(0, levels)
    dtype = code_dtype(x.device)
    return (codes - 128).to(dtype) if dtype is torch.int8 else codes.to(dtype)


def in_planes(x: Tensor) -> bool:
    """Whether each image of ``x`` [B, H, W, C] lies in memory as [C, H, W], as eager models' NCHW images do."""
    return x.ndim == 4 and not x.is_contiguous() and x.stride()[1:] == (x.shape[2], 1, x.shape[1] * x.shape[2])


def like_planes(y: Tensor) -> Tensor:
    """``y`` [B, H, W, C], copied so that each image lies in memory as [C, H, W]."""
    return y.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def _exact(device: torch.device) -> torch.dtype:
    """The type that sums of integer products are accumulated in."""
    return torch.float32 if device.type == "mps" else torch.float64


def _rounding(device: torch.device) -> torch.dtype:
    """The type that sums of floating-point products are accumulated in.

    On a GPU cuDNN may multiply float32 images in TF32, as it does in torch's own convolutions
    (``torch.backends.cudnn.allow_tf32``); 16-bit images are exact in TF32, and so are the weights.
    """
    return torch.float64 if device.type == "cpu" else torch.float32


def _has_wide_sums(x: Tensor) -> bool:
    """Whether ``torch.mm`` of 16-bit operands, which hold 8-bit weights exactly, can return its float32 sums: on
    NVIDIA GPUs."""
    return x.device.type == "cuda" and x.dtype.itemsize == 2 and torch.version.hip is None


def _centered(x_q: Tensor, zero_point: Tensor, sums: torch.dtype | None) -> Tensor:
    """``x_q - zero_point`` in the type of the sums; int8 codes are the uint8 ones minus 128."""
    dtype = sums or _exact(x_q.device)
    shift = 128 if x_q.dtype == torch.int8 else 0
    return x_q.to(dtype) - (zero_point.to(dtype) - shift)


def _by_integers(x_q: Tensor, w: Tensor, sums: torch.dtype | None) -> bool:
    """Whether to accumulate on integer units; their int32 limits how many terms (``w`` without its first dimension)
    a sum may have."""
    return sums is None and x_q.device.type in INTEGER_UNITS and w.shape[1:].numel() <= int_mm.LONGEST


def _finish(total: Tensor, scale: Tensor, row_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scales and bias in float32, then one rounding to the output type."""
    y = total.to(torch.float32) * scale
    if row_scale is not None:
        y = y * row_scale.unsqueeze(-1)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(dtype)


def _conv(x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Tensor:
    """NHWC convolution in the type of ``x``, padded with 0, which for centered codes stands for the zero point."""
    y = F.conv2d(x.permute(0, 3, 1, 2), w.to(x.dtype).permute(0, 3, 1, 2), None, stride, padding, dilation, groups)
    return y.permute(0, 2, 3, 1).contiguous()


def linear(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, row_scale: Tensor | None, weight_bits: int,
    out_dtype: torch.dtype, *, sums: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Integer product of activation codes and weights; see :mod:`inductor_kernels.ops`."""
    checks.linear(
        x_q, weight, weight_zero_point, weight_sum, scale, zero_point, bias, row_scale, weight_bits, out_dtype
    )
    w = unpack_weight(weight, weight_zero_point, weight_bits, x_q.shape[-1])
    if _by_integers(x_q, w, sums):
        total = int_mm.linear(x_q, w, weight_sum, zero_point)
    else:
        x = _centered(x_q, zero_point, sums)
        total = x @ w.to(x.dtype).t()
    return _finish(total, scale, row_scale, bias, out_dtype)


def linear_post(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, row_scale: Tensor | None, weight_bits: int, out_dtype: torch.dtype,
    other: Tensor | None, activation: str, out_inv_scale: Tensor | None, out_zero_point: Tensor | None,
) -> Tensor:  # fmt: skip
    """``linear``, then :func:`post`, all in float32."""
    checks.post(x_q, weight, out_dtype, other, activation, out_inv_scale, out_zero_point)
    product = (x_q, weight, weight_zero_point, weight_sum, scale, zero_point, bias, row_scale, weight_bits)
    return post(linear(*product, torch.float32), out_dtype, other, activation, out_inv_scale, out_zero_point)


def linear_glu(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, row_scale: Tensor | None, weight_bits: int, out_dtype: torch.dtype,
    activation: str,
) -> Tensor:  # fmt: skip
    """``linear``, then :func:`glu`, all in float32."""
    checks.glu(weight, activation)
    product = (x_q, weight, weight_zero_point, weight_sum, scale, zero_point, bias, row_scale, weight_bits)
    return glu(linear(*product, torch.float32), out_dtype, activation)


def glu(y: Tensor, out_dtype: torch.dtype, activation: str) -> Tensor:
    """The first half of the float32 product ``y`` [..., N] times the activation of its second half."""
    value, gate = y.chunk(2, -1)
    return (value * ACTIVATIONS[activation](gate)).to(out_dtype)


ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def post(
    y: Tensor, out_dtype: torch.dtype, other: Tensor | None, activation: str, inv_scale: Tensor | None,
    zero_point: Tensor | None,
) -> Tensor:  # fmt: skip
    """The activation of the float32 product ``y`` [..., N] plus ``other``; its codes where ``inv_scale`` and
    ``zero_point`` are given."""
    y = ACTIVATIONS[activation](y if other is None else y + other)
    if inv_scale is None or zero_point is None:
        return y.to(out_dtype)
    return quantize(y, inv_scale, zero_point, 255)


def conv2d(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, weight_bits: int, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, out_dtype: torch.dtype, *, sums: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """NHWC convolution of activation codes; padding reads the zero point."""
    checks.conv2d(
        x_q, weight, weight_zero_point, weight_sum, scale, zero_point, bias, weight_bits,
        stride, padding, dilation, groups, out_dtype,
    )  # fmt: skip
    w = unpack_weight(weight, weight_zero_point, weight_bits, x_q.shape[-1] // groups)
    if groups == 1 and _by_integers(x_q, w, sums):
        total = int_mm.conv2d(x_q, w, weight_sum, zero_point, stride, padding, dilation)
    else:
        total = _conv(_centered(x_q, zero_point, sums), w, stride, padding, dilation, groups)
    return _finish(total, scale, None, bias, out_dtype)


def linear_weight_only(
    x: Tensor, weight: Tensor, weight_zero_point: Tensor | None, scale: Tensor, bias: Tensor | None,
    weight_bits: int, *, sums: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Floating point activations times integer weights."""
    checks.linear_weight_only(x, weight, weight_zero_point, scale, bias, weight_bits)
    w = unpack_weight(weight, weight_zero_point, weight_bits, x.shape[-1])
    if sums is None and _has_wide_sums(x):
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        total = torch.mm(rows, w.to(x.dtype).t(), out_dtype=torch.float32).reshape(*x.shape[:-1], w.shape[0])
    else:
        dtype = sums or _rounding(x.device)
        total = x.to(dtype) @ w.to(dtype).t()
    return _finish(total, scale, None, bias, x.dtype)


def conv2d_weight_only(
    x: Tensor, weight: Tensor, weight_zero_point: Tensor | None, scale: Tensor, bias: Tensor | None,
    weight_bits: int, stride: list[int], padding: list[int], dilation: list[int], groups: int,
    *, sums: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Floating point NHWC convolution with integer weights."""
    checks.conv2d_weight_only(x, weight, weight_zero_point, scale, bias, weight_bits, stride, padding, dilation, groups)
    w = unpack_weight(weight, weight_zero_point, weight_bits, x.shape[-1] // groups)
    total = _conv(x.to(sums or _rounding(x.device)), w, stride, padding, dilation, groups)
    return _finish(total, scale, None, bias, x.dtype)


def quantize_linear(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int, weight: Tensor, weight_zero_point: Tensor | None,
    weight_sum: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int,
) -> Tensor:  # fmt: skip
    """``quantize``, then ``linear``."""
    checks.quantize(x, inv_scale, zero_point, levels)
    codes = quantize(x, inv_scale, zero_point, levels)
    return linear(codes, weight, weight_zero_point, weight_sum, scale, zero_point, bias, None, weight_bits, x.dtype)


def quantize_conv2d(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int, weight: Tensor, weight_zero_point: Tensor | None,
    weight_sum: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int, stride: list[int],
    padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """``quantize``, then ``conv2d``; the result has the memory layout (NHWC or NCHW) of ``x``."""
    checks.quantize(x, inv_scale, zero_point, levels)
    codes = quantize(x, inv_scale, zero_point, levels)
    product = (weight, weight_zero_point, weight_sum, scale, zero_point, bias, weight_bits)
    y = conv2d(codes, *product, stride, padding, dilation, groups, x.dtype)
    return like_planes(y) if in_planes(x) else y
