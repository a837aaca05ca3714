"""Integer products on a CPU at shapes of SDXL's UNet and of the bundled one, against float32.

Eager, with activations already quantized; checked against the reference before timing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import inductor_kernels.ops  # noqa: F401
from inductor_kernels import packing, reference

from .turns import in_turn

OPS = torch.ops.inductor_kernels
BITS = (8, 4, 2)
# rows, outputs, inputs
LINEAR = [(1024, 640, 640), (256, 1280, 1280), (77, 1280, 2048), (2048, 64, 64), (512, 512, 128)]
# batch, height = width, inputs, outputs, kernel
CONV = [(1, 32, 320, 320, 3), (1, 16, 640, 640, 3), (8, 16, 32, 32, 3), (8, 8, 128, 64, 1)]
QUICK = {LINEAR[1], LINEAR[3], CONV[1], CONV[2]}
ZERO_POINT = torch.tensor(131, dtype=torch.int32)


def marked(shapes: list[tuple[int, ...]]) -> list[Any]:
    return [pytest.param(s, id="x".join(map(str, s)), marks=[pytest.mark.quick] if s in QUICK else []) for s in shapes]


def weight(shape: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor | None, None, Tensor]:
    """(stored, zero_point, weight_sum, scale) as the operators take them."""
    scale = torch.rand(shape[0]) / 1000 + 1e-4
    if bits == 8:
        return torch.randint(-127, 128, shape, dtype=torch.int8), None, None, scale
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    return packing.pack(codes, bits), torch.full(shape[:1], 2 ** (bits - 1), dtype=torch.int8), None, scale


def check(y: Tensor, expected: Tensor) -> None:
    """The integer sum is exact; scaling it rounds in the last place."""
    error = (y - expected).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps * expected.abs().max(), f"differs by {error}"


@pytest.mark.parametrize("shape", marked(LINEAR))
def test_linear(benchmark: Any, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    torch.manual_seed(0)
    x_q, x, w = torch.randint(0, 256, (m, k), dtype=torch.uint8), torch.randn(m, k), torch.randn(n, k)
    bias = torch.randn(n)
    calls: dict[str, Callable[[], object]] = {"float32": lambda: F.linear(x, w, bias)}
    for bits in BITS:
        arguments = (x_q, *weight((n, k), bits), ZERO_POINT, bias, None, bits, torch.float32)
        check(OPS.linear(*arguments), reference.linear(*arguments))
        calls[f"W{bits}A8"] = lambda a=arguments: OPS.linear(*a)
    in_turn(benchmark, calls)


@pytest.mark.parametrize("shape", marked(CONV))
def test_conv2d(benchmark: Any, shape: tuple[int, int, int, int, int]) -> None:
    batch, size, c, o, kernel = shape
    pad = [kernel // 2] * 2
    torch.manual_seed(0)
    x_q = torch.randint(0, 256, (batch, size, size, c), dtype=torch.uint8)
    x = torch.randn(batch, c, size, size).to(memory_format=torch.channels_last)
    w = torch.randn(o, c, kernel, kernel).to(memory_format=torch.channels_last)
    bias = torch.randn(o)
    calls: dict[str, Callable[[], object]] = {"float32": lambda: F.conv2d(x, w, bias, padding=pad)}
    for bits in BITS:
        geometry = ([1, 1], pad, [1, 1], 1, torch.float32)
        arguments = (x_q, *weight((o, kernel, kernel, c), bits), ZERO_POINT, bias, bits, *geometry)
        check(OPS.conv2d(*arguments), reference.conv2d(*arguments))
        calls[f"W{bits}A8"] = lambda a=arguments: OPS.conv2d(*a)
    in_turn(benchmark, calls)
