"""oneDNN's int8 products through torch's operators: codes with any zero point times symmetric int8 weights.

oneDNN takes unsigned activations, so 128 is added to signed codes; zero points refer to unsigned codes already. Weights
are laid out once (``packed``), those of convolutions for one input shape. oneDNN reads scales and biases as if they
were contiguous, whatever their strides.

Without VNNI or AMX it multiplies with ``vpmaddubsw``, which adds two products in 16 bits and *saturates*: 8-bit codes
times 8-bit weights are 13-22 % wrong, unless the weights are small (see :mod:`inductor_kernels.routes`).
"""

import functools

import torch
from torch import Tensor

from . import compat_eager

POST_OPS = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


@functools.cache
def available() -> bool:
    return torch.backends.mkldnn.is_available()


@functools.cache
def avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@functools.cache
def int8_is_exact() -> bool:
    """Whether products of all codes and weights are exact on this machine: by the CPU's flags and by a trial."""
    if not available() or not compat_eager.has_int8_dot_products():
        return False
    x = torch.full((64, 128), 255, dtype=torch.uint8)
    w = torch.full((64, 128), 127, dtype=torch.int8)
    return bool((linear(x, 0, pack_linear(w), torch.ones(64), None) == 255 * 127 * 128).all())


def writes(out_dtype: torch.dtype) -> bool:
    """Whether the fast products can write this type: float32, and with AVX-512 bfloat16. Without AVX-512 oneDNN
    writes bfloat16 with a kernel that is 100 times slower."""
    return out_dtype is torch.float32 or (out_dtype is torch.bfloat16 and avx512())


def pack_linear(w: Tensor) -> Tensor:
    """w: int8 [N, K]."""
    return torch.ops.onednn.qlinear_prepack(w, None)


def linear(
    x_q: Tensor, zero_point: int, packed: Tensor, scale: Tensor, bias: Tensor | None, out_scale: float = 1.0,
    out_zero_point: int = 0, dtype: torch.dtype = torch.float32, activation: str = "none",
) -> Tensor:  # fmt: skip
    """activation(scale * (x_q - zero_point) @ w.T + bias) [..., N], quantized again where ``dtype`` is uint8."""
    return torch.ops.onednn.qlinear_pointwise.default(
        _unsigned(x_q), 1.0, zero_point, packed, scale.contiguous(), _zeros(scale.shape[0]), _float(bias), out_scale,
        out_zero_point, dtype, POST_OPS[activation][0], [], POST_OPS[activation][1],
    )  # fmt: skip


def linear_add(
    x_q: Tensor, zero_point: int, packed: Tensor, scale: Tensor, bias: Tensor | None, other: Tensor, dtype: torch.dtype
) -> Tensor:
    """The product plus ``other`` [..., N]; ``dtype`` is the type of both ``other`` and the result."""
    return torch.ops.onednn.qlinear_pointwise.binary(
        _unsigned(x_q), 1.0, zero_point, packed, scale.contiguous(), _zeros(scale.shape[0]), other.contiguous(),
        _float(bias), 1.0, 0, dtype, 1.0, 0, "add", 1.0, "none", [], "",
    )  # fmt: skip


def pack_conv2d(
    w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int, shape: list[int]
) -> Tensor:
    """w: int8 [O, C / groups, kh, kw]; shape: of the input, [B, C, H, W]. The layout for a zero point other than 0
    (here 1) serves all zero points."""
    return torch.ops.onednn.qconv_prepack(w, torch.ones(w.shape[0]), 1.0, 1, stride, padding, dilation, groups, shape)


def conv2d(
    x_q: Tensor, zero_point: int, packed: Tensor, scale: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[B, OH, OW, O] of codes [B, H, W, C]; padding reads the zero point."""
    y = torch.ops.onednn.qconv_pointwise.default(
        _unsigned(x_q).permute(0, 3, 1, 2), 1.0, zero_point, packed, scale.contiguous(), _zeros(scale.shape[0]),
        _float(bias), stride, padding, dilation, groups, 1.0, 0, dtype, "none", [], "",
    )  # fmt: skip
    return y.permute(0, 2, 3, 1).contiguous()


def _unsigned(x_q: Tensor) -> Tensor:
    x_q = x_q.contiguous()
    return x_q if x_q.dtype == torch.uint8 else x_q.view(torch.uint8) ^ 128


def _float(bias: Tensor | None) -> Tensor | None:
    """The bias as float32: with a 16-bit bias oneDNN runs a reference kernel, thousands of times slower."""
    return None if bias is None else bias.float().contiguous()


@functools.lru_cache(maxsize=256)
def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)
