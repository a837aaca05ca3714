"""How moments are stored: float32, bfloat16 with dithered rounding, or torchao's 8-bit blocks.

A stored moment is handled as its *pieces*, tensors that are flat in memory order: (values,) or (codes, scales, map).
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
"""Values from which 8 bits pay, as in torchao; smaller tensors, and those that blocks do not divide, stay float32."""

Pieces = tuple[Tensor, ...]


def kind_for(p: Tensor, kind: str) -> str:
    """How a moment of ``p`` (a local tensor) is stored where ``kind`` is asked for."""
    blocks = p.numel() >= SMALLEST_8BIT and p.numel() % BLOCK == 0 and p.is_contiguous()
    return "float32" if kind == "8bit" and not blocks else kind


def kind_of(moment: Tensor) -> str | None:
    """How a moment (a local tensor) is stored; None for what is none."""
    if isinstance(moment, OptimState8bit):
        return "8bit"
    return {torch.float32: "float32", torch.bfloat16: "bfloat16"}.get(moment.dtype)


def new_moment(p: Tensor, kind: str, *, signed: bool) -> Tensor:
    """Zeros for parameter ``p`` (a local tensor), laid out like it."""
    kind = kind_for(p, kind)
    if kind == "8bit":
        return OptimState8bit.zeros(p.shape, signed, BLOCK, p.device, dtype=torch.float32)
    return torch.zeros_like(p, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)


def pieces(moment: Tensor, flat: Callable[[Tensor], Tensor] = flat) -> Pieces:
    """The tensors that hold a moment, made flat by ``flat``."""
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
    """Write float32 ``values`` [n] into the pieces; ``dither`` (16 bits) changes with the step."""
    if len(stored) == 3:
        scaled, scale = scale_tensor(values, BLOCK)
        stored[0].copy_(quantize_8bit_with_qmap(scaled, stored[2]))
        stored[1].copy_(scale)
    elif stored[0].dtype is torch.bfloat16:
        stored[0].copy_(dithered(values, dither))
    elif stored[0] is not values:
        stored[0].copy_(values)


def dithered(x: Tensor, dither: Tensor | int) -> Tensor:
    """float32 [n] rounded to bfloat16, up or down with the odds of the distance, so that the mean is right.

    To nearest, an average that decays by a thousandth a step would stand still: half a step of bfloat16 is two to four
    thousandths. The odds come from the element's position and the step, not from a generator, so that a resumed
    run repeats them: over the positions of an aligned block of 65536 every threshold occurs once.
    """
    position = torch.arange(x.numel(), dtype=torch.int32, device=x.device) & 0xFFFF
    threshold = ((position * 25173) ^ dither) & 0xFFFF  # 25173 is odd, and the product stays below 2^31
    rounded = ((x.view(torch.int32) + threshold) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def dither_of(step: int) -> int:
    """16 bits for a step: multiples of the golden ratio's fraction, which fill an interval evenly (Weyl)."""
    return step * 40503 & 0xFFFF
