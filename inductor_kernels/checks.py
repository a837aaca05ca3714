"""Checks of the operators' arguments. An error names the operator, the argument, its value and what was expected."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .packing import packed_length

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")
GATES = ACTIVATIONS[1:]


def _require(condition: bool, op: str, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"inductor_kernels::{op}: {name} is {value}; expected {expected}")


def _describe(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _vector(op: str, name: str, tensor: Tensor | None, length: int, dtypes: Sequence[torch.dtype]) -> None:
    good = tensor is not None and tensor.ndim == 1 and tensor.dtype in dtypes and tensor.shape[0] == length
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    _require(good, op, name, _describe(tensor), f"{allowed} [{length}]")


def weight(op: str, weight: Tensor, zero_point: Tensor | None, bits: int, length: int, ndim: int) -> None:
    """Check a weight: int8 ``[N, ..., length]`` without a zero point, or packed uint8 with one, int8 ``[N]``."""
    _require(bits in (2, 4, 8), op, "weight_bits", bits, "2, 4 or 8")
    dtype = torch.int8 if bits == 8 else torch.uint8
    last = length if bits == 8 else packed_length(length, bits)
    good = weight.dtype == dtype and weight.ndim == ndim and weight.shape[-1] == last
    expected = f"{dtype} with {ndim} dimensions, the last one {last} long ({length} codes of {bits} bits)"
    _require(good, op, "weight", _describe(weight), expected)
    if bits == 8:
        _require(zero_point is None, op, "weight_zero_point", _describe(zero_point), "None for 8-bit weights")
    else:
        _vector(op, "weight_zero_point", zero_point, weight.shape[0], (torch.int8,))


def _scalar(op: str, name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
    good = tensor is not None and tensor.ndim == 0 and tensor.dtype == dtype
    article = "an" if dtype == torch.int32 else "a"
    _require(good, op, name, _describe(tensor), f"{article} {str(dtype)[6:]} tensor without dimensions")


def _codes(op: str, x_q: Tensor, zero_point: Tensor, out_dtype: torch.dtype) -> None:
    _require(x_q.dtype in (torch.uint8, torch.int8), op, "x_q", _describe(x_q), "uint8 or int8 codes")
    _scalar(op, "zero_point", zero_point, torch.int32)
    _require(out_dtype in FLOATS, op, "out_dtype", out_dtype, "float32, bfloat16 or float16")


def _channels(op: str, n: int, scale: Tensor, bias: Tensor | None) -> None:
    _vector(op, "scale", scale, n, (torch.float32,))
    if bias is not None:
        _vector(op, "bias", bias, n, FLOATS)


def _geometry(
    op: str, x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> None:
    _require(x.ndim == 4, op, "x", _describe(x), "4 dimensions, [B, H, W, C]")
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        good = len(value) == 2 and value[0] >= least and value[1] >= least
        _require(good, op, name, list(value), f"two integers >= {least}")
    good = groups >= 1 and x.shape[3] % groups == 0 and w.shape[0] % groups == 0
    _require(good, op, "groups", groups, f"a divisor of {x.shape[3]} input and {w.shape[0]} output channels")
    height, width = output_size(x, w, stride, padding, dilation)
    small = f"{list(x.shape)} with a {w.shape[1]}x{w.shape[2]} kernel"
    _require(height > 0 and width > 0, op, "x", small, "an image at least as large as the dilated kernel")


def output_size(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of the convolution of ``x`` [B, H, W, C] by ``w`` [O, kh, kw, C]."""
    height, width = (
        (x.shape[1 + i] + 2 * padding[i] - dilation[i] * (w.shape[1 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    return height, width


def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int) -> None:
    """Check all arguments of ``inductor_kernels::quantize``."""
    op = "quantize"
    _require(x.dtype in FLOATS, op, "x", _describe(x), "float32, bfloat16 or float16")
    _scalar(op, "inv_scale", inv_scale, torch.float32)
    _scalar(op, "zero_point", zero_point, torch.int32)
    _require(0 < levels <= 255, op, "levels", levels, "the largest code, 1 to 255")


def linear(
    x_q: Tensor, w: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, row_scale: Tensor | None, weight_bits: int, out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Check all arguments of ``inductor_kernels::linear``."""
    op = "linear"
    _codes(op, x_q, zero_point, out_dtype)
    _require(x_q.ndim >= 1, op, "x_q", _describe(x_q), "at least one dimension")
    weight(op, w, weight_zero_point, weight_bits, x_q.shape[-1], 2)
    if weight_sum is not None:
        _vector(op, "weight_sum", weight_sum, w.shape[0], (torch.int32,))
    _channels(op, w.shape[0], scale, bias)
    if row_scale is not None:
        good = row_scale.dtype == torch.float32 and row_scale.shape == x_q.shape[:-1]
        _require(good, op, "row_scale", _describe(row_scale), f"float32 {list(x_q.shape[:-1])}")


def post(
    x_q: Tensor, w: Tensor, out_dtype: torch.dtype, other: Tensor | None, activation: str, inv_scale: Tensor | None,
    zero_point: Tensor | None,
) -> None:  # fmt: skip
    """Check the arguments that ``inductor_kernels::linear_post`` has beside those of ``linear``."""
    op = "linear_post"
    if other is not None:
        good = other.dtype == out_dtype and other.shape == (*x_q.shape[:-1], w.shape[0])
        _require(good, op, "other", _describe(other), f"{out_dtype} {[*x_q.shape[:-1], w.shape[0]]}")
    _require(activation in ACTIVATIONS, op, "activation", repr(activation), " or ".join(map(repr, ACTIVATIONS)))
    if inv_scale is not None or zero_point is not None:
        _scalar(op, "out_inv_scale", inv_scale, torch.float32)
        _scalar(op, "out_zero_point", zero_point, torch.int32)


def glu(w: Tensor, activation: str) -> None:
    """Check what ``inductor_kernels::linear_glu`` expects beyond ``linear``."""
    op = "linear_glu"
    _require(w.shape[0] % 2 == 0, op, "weight", _describe(w), "an even number of rows, values and gates")
    _require(activation in GATES, op, "activation", repr(activation), " or ".join(map(repr, GATES)))


def conv2d(
    x_q: Tensor, w: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, weight_bits: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Check all arguments of ``inductor_kernels::conv2d``."""
    op = "conv2d"
    _codes(op, x_q, zero_point, out_dtype)
    _require(w.ndim == 4, op, "weight", _describe(w), "4 dimensions, [O, kh, kw, C/groups]")
    _geometry(op, x_q, w, stride, padding, dilation, groups)
    weight(op, w, weight_zero_point, weight_bits, x_q.shape[-1] // groups, 4)
    if weight_sum is not None:
        _vector(op, "weight_sum", weight_sum, w.shape[0], (torch.int32,))
    _channels(op, w.shape[0], scale, bias)


def linear_weight_only(
    x: Tensor, w: Tensor, weight_zero_point: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int
) -> None:
    """Check all arguments of ``inductor_kernels::linear_weight_only``."""
    op = "linear_weight_only"
    _require(x.dtype in FLOATS and x.ndim >= 1, op, "x", _describe(x), "float32, bfloat16 or float16 [..., K]")
    weight(op, w, weight_zero_point, weight_bits, x.shape[-1], 2)
    _channels(op, w.shape[0], scale, bias)


def conv2d_weight_only(
    x: Tensor, w: Tensor, weight_zero_point: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> None:  # fmt: skip
    """Check all arguments of ``inductor_kernels::conv2d_weight_only``."""
    op = "conv2d_weight_only"
    _require(x.dtype in FLOATS, op, "x", _describe(x), "float32, bfloat16 or float16")
    _require(w.ndim == 4, op, "weight", _describe(w), "4 dimensions, [O, kh, kw, C/groups]")
    _geometry(op, x, w, stride, padding, dilation, groups)
    weight(op, w, weight_zero_point, weight_bits, x.shape[-1] // groups, 4)
    _channels(op, w.shape[0], scale, bias)
