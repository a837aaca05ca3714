"""Storage of moments: float32, bfloat16 with dithered rounding, or torchao's 8-bit blocks.

Functions here take a stored moment as its *pieces*, flat tensors in memory order: (values,) or (codes, scales, map).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor
from torchao.optim.subclass_8bit import OptimState8bit

from .layout import flat

KINDS = ("float32", "bfloat16", "8bit")
BLOCK = 256
SMALLEST_8BIT = 4096
"""Fewest values that are stored in 8 bits, as in torchao; smaller tensors, and those whose size is not a multiple of
``BLOCK``, stay float32."""

Pieces = tuple[Tensor, ...]


def kind_for(p: Tensor, kind: str) -> str:
    """The storage of a moment of ``p`` (a local tensor) if the options ask for ``kind``."""
    blocks = p.numel() >= SMALLEST_8BIT and p.numel() % BLOCK == 0 and p.is_contiguous()
    return "float32" if kind == "8bit" and not blocks else kind


def kind_of(moment: Tensor) -> str | None:
    """The storage of a moment (a local tensor); None if a tensor of this dtype cannot be a moment."""
    if isinstance(moment, OptimState8bit):
        return "8bit"
    return {torch.float32: "float32", torch.bfloat16: "bfloat16"}.get(moment.dtype)


def new_moment(p: Tensor, kind: str, *, signed: bool) -> Tensor:
    """A moment of zeros for parameter ``p`` (a local tensor), in its memory order."""
    kind = kind_for(p, kind)
    if kind == "8bit":
        return OptimState8bit.zeros(p.shape, signed, BLOCK, p.device, dtype=torch.float32)
    return torch.zeros_like(p, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)


def pieces(moment: Tensor, flat: Callable[[Tensor], Tensor] = flat) -> Pieces:
    """The tensors that store a moment, flattened by ``flat``."""
    if isinstance(moment, OptimState8bit):
        return flat(moment.codes), flat(moment.scale), moment.qmap
    return (flat(moment),)


def part(stored: Pieces, start: int, stop: int) -> Pieces:
    """The pieces of values [start, stop); start is a multiple of BLOCK."""
    if len(stored) == 1:
        return (stored[0][start:stop],)
    codes, scale, qmap = stored
    return codes[start:stop], scale[start // BLOCK : -(-stop // BLOCK)], qmap


def load(stored: Pieces) -> Tensor:
    """float32 values [n]; the stored tensor itself where it is float32."""
    if len(stored) == 1:
        return stored[0].to(torch.float32)
    codes, scale, qmap = stored
    return dequant_with_qmap(codes, qmap, scale)


def store(stored: Pieces, values: Tensor, dither: Tensor | int) -> None:
    """Writes float32 ``values`` [n] into the pieces; ``dither`` is from ``dither_of(step)``."""
    if len(stored) == 3:
        scaled, scale = scale_tensor(values, BLOCK)
        stored[0].copy_(quantize_8bit_with_qmap(scaled, stored[2]))
        stored[1].copy_(scale)
    elif stored[0].dtype is torch.bfloat16:
        stored[0].copy_(dithered(values, dither))
    elif stored[0] is not values:
        stored[0].copy_(values)


def dithered(x: Tensor, dither: Tensor | int) -> Tensor:
    """float32 [n] rounded to bfloat16 stochastically: up or down with probabilities that preserve the mean.

    Rounded to nearest, an average that decays by a thousandth per step would never change: half a step of bfloat16 is
    two to four thousandths. The threshold of an element is computed from its position and the step instead of a random
    generator, so that a resumed run repeats it; every threshold occurs once in an aligned block of 65536 positions.
    """
    position = torch.arange(x.numel(), dtype=torch.int32, device=x.device) & 0xFFFF
    threshold = ((position * 25173) ^ dither) & 0xFFFF  # 25173 is odd, and the product stays below 2^31
    rounded = ((x.view(torch.int32) + threshold) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def dither_of(step: int) -> int:
    """16 bits for a step: multiples of the golden ratio's fraction, which fill an interval evenly (a Weyl sequence)."""
    return step * 40503 & 0xFFFF
