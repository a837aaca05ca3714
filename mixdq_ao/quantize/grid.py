"""Quantization grids of a weight (one scale and zero point per output channel), and the search for the best one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this a scale is subnormal in float32, its reciprocal overflows, and codes become NaN.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny * 4
SMALLEST_SHRINK = {2: 0.2, 4: 0.4, 8: 0.7}
"""{bits: narrowest range searched, as a fraction of the min-max range}. The best range of a normal distribution is 0.4
of what 1000 samples span with 4 levels, 0.75 with 16."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The values scale * (code - zero) of integer codes from ``lowest`` to ``highest``; scale and zero: float32 [N]."""

    scale: Tensor
    zero: Tensor
    lowest: int
    highest: int

    def codes(self, rows: Tensor) -> Tensor:
        """The nearest codes of ``rows`` [N, K], float32."""
        return (torch.round(rows / self.scale[:, None]) + self.zero[:, None]).clamp(self.lowest, self.highest)

    def values(self, codes: Tensor) -> Tensor:
        """The values of codes [N, K]."""
        return (codes - self.zero[:, None]) * self.scale[:, None]

    @classmethod
    def cat(cls, grids: Sequence[Grid]) -> Grid:
        """Concatenates grids of one bit width along rows."""
        scale, zero = (torch.cat([getattr(g, n) for g in grids]) for n in ("scale", "zero"))
        return cls(scale, zero, grids[0].lowest, grids[0].highest)

    def where(self, better: Tensor, other: Grid) -> Grid:
        """This grid in rows where ``better`` [N], the other elsewhere."""
        scale, zero = torch.where(better, self.scale, other.scale), torch.where(better, self.zero, other.zero)
        return Grid(scale, zero, self.lowest, self.highest)


def minmax_grid(rows: Tensor, bits: int, symmetric: bool) -> Grid:
    """The grid whose ends are the extremes of each row of ``rows`` [N, K] (see ``quantize_weight``)."""
    if symmetric:
        top, half = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
        scale = usable_scale(rows.abs().amax(1) / top)
        middle = 0 if bits == 8 else half
        return Grid(scale, torch.full_like(scale, middle), middle - top, middle + top)
    top = 2**bits - 1
    lo, hi = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    scale = usable_scale(hi / top - lo / top)
    return Grid(scale, torch.round(-lo / scale).clamp(0, top), 0, top)


def usable_scale(scale: Tensor) -> Tensor:
    """Replaces a scale of 0 (a channel of zeros, which any scale represents) by 1, raises subnormal ones to normal."""
    return torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=SMALLEST_SCALE))


def shrunk_grids(widest: Grid, bits: int, symmetric: bool, steps: int) -> Iterator[Grid]:
    """``widest`` first, then grids whose range shrinks towards zero in ``steps`` steps; asymmetric ones also with the
    zero point shifted by one to either side."""
    yield widest
    for factor in torch.linspace(1, SMALLEST_SHRINK[bits], steps + 1).tolist():
        scale = usable_scale(widest.scale * factor)
        for shift in (0,) if symmetric else (0, -1, 1):
            if factor < 1 or shift:
                zero = (widest.zero + shift).clamp(widest.lowest, widest.highest) if shift else widest.zero
                yield Grid(scale, zero, widest.lowest, widest.highest)


def best_grid(grids: Iterable[Grid], error: Callable[[Grid], Tensor]) -> Grid:
    """For each row the grid with the least ``error`` [N]; the first of equals."""
    best, least = None, torch.empty(0)
    for grid in grids:
        found = error(grid)
        if best is None:
            best, least = grid, found
        else:
            better = found < least
            best, least = grid.where(better, best), torch.where(better, found, least)
    assert best is not None
    return best


def squared_error(rows: Tensor, unit: Tensor, moment: Tensor | None = None) -> Callable[[Grid], Tensor]:
    """A function that gives the error [N] of rounding ``rows`` [N, K] to nearest in a grid.

    The error is the sum of squares; with ``moment`` M [K, K], the mean of x x^T over the layer's inputs x, it is
    d M d^T: the mean square change of the layer's output where a row changes by d. Rows are divided by ``unit`` [N], so
    that no square overflows float32.
    """

    def error(grid: Grid) -> Tensor:
        return output_error((grid.values(grid.codes(rows)) - rows) / unit[:, None], moment)

    return error


def output_error(change: Tensor, moment: Tensor | None) -> Tensor:
    """The error [N] of a change [N, K] of the weight: sum of squares, or d M d^T with ``moment`` M."""
    return ((change if moment is None else change @ moment) * change).sum(1)
