"""Integer products on a GPU in eager mode: ``torch._int_mm``, int8 times int8 with int32 sums.

It requires more than 16 rows and multiples of 8 inputs and outputs (aten/src/ATen/native/cuda/Blas.cpp); operands are
padded with zeros. The second operand is a transposed view, the only layout that cuBLAS supports on all GPUs.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks, compat_eager

LONGEST = 1 << 16  # terms of a sum: int32 holds that many of at most 255 * 127
PIECE = 1 << 26  # bytes of a convolution's windows gathered at a time
ROWS = 32  # the first operand is padded to at least as many


def _signed(x_q: Tensor) -> Tensor:
    """Codes minus 128 as int8."""
    return x_q if x_q.dtype == torch.int8 else (x_q ^ 128).view(torch.int8)


def _filled(a: Tensor, rows: int, columns: int) -> Tensor:
    """``a`` contiguous, padded with zeros to this size."""
    a = a.contiguous()
    return a if a.shape == (rows, columns) else F.pad(a, (0, columns - a.shape[1], 0, rows - a.shape[0]))


def _product(a: Tensor, w: Tensor) -> Tensor:
    """int8 ``a`` [M, K] times ``w`` [N, K] transposed: int32 [M, N]."""
    (m, k), n = a.shape, w.shape[0]
    if not (m and k and n):
        return a.new_zeros((m, n), dtype=torch.int32)
    deep = k + -k % 8
    a, w = _filled(a, max(m, ROWS), deep), _filled(w, n + -n % 8, deep)
    try:
        total = compat_eager.int_mm(a, w.t())
    except RuntimeError as error:
        if "BLAS_STATUS_NOT_SUPPORTED" not in str(error):
            raise
        total = (a.double() @ w.t().double()).to(torch.int32)  # exact; some GPUs' cuBLAS lacks int8 products
    return total[:m, :n]


def _corrected(total: Tensor, w: Tensor, weight_sum: Tensor | None, zero_point: Tensor) -> Tensor:
    """``total`` of signed codes, minus the signed zero point times the sums of ``w`` [N, ...]."""
    weight_sum = w.flatten(1).sum(1, dtype=torch.int32) if weight_sum is None else weight_sum
    return total - (zero_point - 128) * weight_sum


def linear(x_q: Tensor, w: Tensor, weight_sum: Tensor | None, zero_point: Tensor) -> Tensor:
    """``sum_k (x_q[..., k] - z) w[n, k]``: int32 [..., N] of int8 ``w`` [N, K], K at most ``LONGEST``."""
    *lead, k = x_q.shape
    total = _product(_signed(x_q).reshape(math.prod(lead), k), w)
    return _corrected(total.reshape(*lead, w.shape[0]), w, weight_sum, zero_point)


def conv2d(
    x_q: Tensor, w: Tensor, weight_sum: Tensor | None, zero_point: Tensor, stride: list[int], padding: list[int],
    dilation: list[int],
) -> Tensor:  # fmt: skip
    """The same over the window of each pixel: int32 [B, OH, OW, N] of ``x_q`` [B, H, W, C] and ``w`` [N, kh, kw, C]."""
    n, high, wide, channels = w.shape
    batch, (out_h, out_w) = x_q.shape[0], checks.output_size(x_q, w, stride, padding, dilation)
    x = _framed(_signed(x_q), zero_point, padding)
    image, row, pixel, code = x.stride()
    windows = (image, row * stride[0], pixel * stride[1], row * dilation[0], pixel * dilation[1], code)
    terms = high * wide * channels
    rows = max(1, PIECE // max(1, batch * out_w * terms))
    pieces = []
    for first in range(0, out_h, rows):
        size = (batch, min(rows, out_h - first), out_w)
        gathered = x[:, first * stride[0] :].as_strided((*size, high, wide, channels), windows)
        pieces.append(_product(gathered.reshape(math.prod(size), terms), w.reshape(n, terms)).reshape(*size, n))
    total = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    return _corrected(total, w, weight_sum, zero_point)


def _framed(x: Tensor, zero_point: Tensor, padding: list[int]) -> Tensor:
    """int8 ``x`` [B, H, W, C], contiguous, each image padded with the zero point's code."""
    top, left = padding
    if not (top or left):
        return x.contiguous()
    batch, high, wide, channels = x.shape
    framed = x.new_empty((batch, high + 2 * top, wide + 2 * left, channels)).fill_(zero_point - 128)
    framed[:, top : top + high, left : left + wide] = x
    return framed
