"""8-bit weights whose upper half is the same weight in 4 bits: two planes of 4 bits, one model's worth of bytes.

Numerics, per output channel (dimension 0). The 8-bit code q in [-127, 119] stands for scale * q. It is stored as

    q + 8 = 16 h + l,   h in [-8, 7] (high plane, as h + 8),   l in [0, 15] (low plane)

so that the high plane alone is the 4-bit code, and the offset of 8 makes h the integer nearest to q / 16 rather than
the next below. Codes end at 119 because 120 / 16 would round to 8. To lose little by that, a channel is turned so that
its larger end is the negative one (its scale is then negative): |scale| = max(larger end / 127, smaller end / 119),
which is that of plain symmetric 8 bit unless the smaller end exceeds 119/127 of the larger, and 6.7 % wider at most
(0.57 dB). The 4-bit step is about max|w| / 8, with exact zero; what it gives up against 4 bits of its own is the zero
point, in channels whose two ends differ.

2 bit: h in four cells of four; a cell stands for 4 floor((h + 8) / 4) + 2 - zero_point, the best of four zero points.
4- and 2-bit scales are refitted to the weight by least squares, so they are not just multiples of the 8-bit one.

The high plane is packed as every 4-bit weight here (``inductor_kernels.packing``), so 4-bit levels read half of the
bytes, in the existing kernels. 8-bit levels put both planes together first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inductor_kernels.packing import pack, unpack

from ..quantize.quantizer import SMALLEST_SCALE, refuse_unusable

TOP, BOTTOM = 119, 127
OFFSET = 8
CELL, MIDDLE = 0xCC, 0x22
"""Two 4-bit codes in a byte: the upper two bits of each, and what is put in the place of the lower two."""
ZERO_POINTS = (7, 8, 9, 10)


@dataclass(frozen=True, slots=True)
class NestedWeight:
    """One weight at 8, 4 and 2 bits.

    Attributes:
        planes: uint8 [2, N, ..., ceil(K / 2)]: high and low 4 bits, input channels last and packed.
        scale: {bits: float32 [N]}. zero_point: {4: int8 [N], 2: int8 [N]}, to be subtracted from 4-bit codes.
        length: K.
    """

    planes: Tensor
    scale: dict[int, Tensor]
    zero_point: dict[int, Tensor]
    length: int

    def integers(self, bits: int) -> Tensor:
        """int8 [N, ..., K], the values that are multiplied."""
        return integers(self.planes, self.zero_point.get(bits), bits, self.length)


def nest(weight: Tensor) -> NestedWeight:
    """Quantizes a weight [N, K] or [O, C / groups, kh, kw] (stored channels last). Raises QuantizationError."""
    refuse_unusable(weight)
    stored = weight.detach().to(torch.float32).movedim(1, -1).contiguous()
    rows = stored.flatten(1)
    lo, hi = -rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    size = torch.maximum(torch.maximum(lo, hi) / BOTTOM, torch.minimum(lo, hi) / TOP)
    size = torch.where(size == 0, torch.ones_like(size), size.clamp(min=SMALLEST_SCALE))
    scale = torch.where(hi > lo, -size, size)
    codes = (torch.round(rows / scale[:, None]).clamp(-BOTTOM, TOP) + OFFSET).to(torch.int8)
    high = ((codes >> 4) + 8).view(torch.uint8)
    planes = torch.stack([pack(p.view(stored.shape), 4) for p in (high, (codes & 15).view(torch.uint8))])
    eight = torch.full((len(rows),), 8, dtype=torch.int8, device=weight.device)
    zero_point, coarse = _cells(rows, high)
    return NestedWeight(
        planes,
        {8: scale, 4: _least_squares(rows, high.to(torch.float32) - 8, 16 * scale), 2: coarse},
        {4: eight, 2: zero_point},
        stored.shape[-1],
    )


def _least_squares(rows: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    """float32 [N]: the scale with which ``values`` [N, M] come nearest to ``rows`` [N, M]."""
    power = values.double().square().sum(1)
    fitted = ((rows.double() * values.double()).sum(1) / power).to(torch.float32)
    usable = (power > 0) & (fitted.abs() >= SMALLEST_SCALE)
    return torch.where(usable, fitted, otherwise)


def _cells(rows: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Zero point (int8 [N]) and scale (float32 [N]) of the 2-bit form with the smallest squared error."""
    scales, errors = [], []
    for zero in ZERO_POINTS:
        values = ((high & 12) | 2).to(torch.float32) - zero
        scales.append(_least_squares(rows, values, torch.ones_like(rows[:, 0])))
        errors.append((rows - scales[-1][:, None] * values).double().square().sum(1))
    best = torch.stack(errors).argmin(0, keepdim=True)
    zero_point = torch.tensor(ZERO_POINTS, dtype=torch.int8, device=rows.device)[best[0]]
    return zero_point, torch.stack(scales).gather(0, best)[0]


def codes(planes: Tensor, bits: int, length: int) -> Tensor:
    """What a kernel of 8 bits (int8 [N, ..., K]), or of 4 (packed), multiplies by; plain aten operators."""
    if bits == 8:
        high, low = unpack(planes[0], 4, length), unpack(planes[1], 4, length)
        return ((high << 4 | low) + 120).view(torch.int8)  # 16 h + l - 136, modulo 256
    return planes[0] if bits == 4 else (planes[0] & CELL) | MIDDLE


def integers(planes: Tensor, zero_point: Tensor | None, bits: int, length: int) -> Tensor:
    """int8 [N, ..., K], the values that are multiplied."""
    stored = codes(planes, bits, length)
    if bits == 8 or zero_point is None:
        return stored
    return unpack(stored, 4, length).view(torch.int8) - zero_point.reshape(-1, *[1] * (stored.dim() - 1))
