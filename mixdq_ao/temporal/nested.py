"""Nested weights: 8-bit codes in two 4-bit planes, the upper of which is by itself the weight at 4 bits.

Numerics, per output channel (dimension 0). The 8-bit code q in [-127, 119] stands for scale * q. It is stored as

    q + 8 = 16 h + l,   h in [-8, 7] (high plane, as h + 8),   l in [0, 15] (low plane)

so that the high plane alone is the 4-bit code; the offset of 8 rounds q / 16 to nearest instead of down. Codes end at
119 because 120 / 16 would round to 8. To lose little by that, the scale of a channel has the sign that makes its end of
larger magnitude a negative code: |scale| = max(larger end / 127, smaller end / 119). This is the scale of plain
symmetric 8 bit unless the smaller end exceeds 119/127 of the larger, and at most 6.7 % wider (0.57 dB). The 4-bit step
is about max|w| / 8, with exact zero. Compared with a separate 4-bit quantization it lacks the zero point, which matters
in channels whose two ends differ.

The 4-bit scale is fitted to the weight by least squares; it is not just 16 times the 8-bit scale.

The high plane is packed like every 4-bit weight here (``inductor_kernels.packing``), so 4-bit levels read half of the
bytes, in the existing kernels. 8-bit levels merge the planes first. There are no 2-bit weights, which would read the
same plane for less precision: layers planned at 2 bits run at 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inductor_kernels.packing import pack, unpack, unpack_weight

from ..quantize.quantizer import SMALLEST_SCALE, refuse_unusable

TOP, BOTTOM = 119, 127
OFFSET = 8


@dataclass(frozen=True, slots=True)
class NestedWeight:
    """One weight at 8 and at 4 bits.

    Attributes:
        planes: uint8 [2, N, ..., ceil(K / 2)]: high and low 4 bits, input channels last and packed.
        scale: {bits: float32 [N]}.
        zero_point: int8 [N], subtracted from 4-bit codes: 8 everywhere.
        length: K.
    """

    planes: Tensor
    scale: dict[int, Tensor]
    zero_point: Tensor
    length: int

    def integers(self, bits: int) -> Tensor:
        """int8 [N, ..., K], the codes with the zero point subtracted."""
        if bits == 8:
            return merged(self.planes, self.length)
        return unpack_weight(self.planes[0], self.zero_point, 4, self.length)


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
    zero_point = torch.full((len(rows),), 8, dtype=torch.int8, device=weight.device)
    coarse = _least_squares(rows, high.to(torch.float32) - 8, 16 * scale)
    return NestedWeight(planes, {8: scale, 4: coarse}, zero_point, stored.shape[-1])


def _least_squares(rows: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    """float32 [N]: the scale with which ``values`` [N, M] come nearest to ``rows`` [N, M]."""
    power = values.double().square().sum(1)
    fitted = ((rows.double() * values.double()).sum(1) / power).to(torch.float32)
    usable = (power > 0) & (fitted.abs() >= SMALLEST_SCALE)
    return torch.where(usable, fitted, otherwise)


def merged(planes: Tensor, length: int) -> Tensor:
    """int8 [N, ..., K], the 8-bit codes from both planes, by plain aten operators."""
    high, low = unpack(planes[0], 4, length), unpack(planes[1], 4, length)
    return ((high << 4 | low) + 120).view(torch.int8)  # 16 (h + 8) + l - 136, modulo 256
