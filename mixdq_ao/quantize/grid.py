"""The values a quantized weight may take: one scale and zero point per output channel, and how they are found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this a scale is subnormal in float32, its reciprocal overflows, and codes become NaN.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny * 4
SMALLEST_SHRINK = {2: 0.2, 4: 0.4, 8: 0.7}
"""How far the search for a range goes, as a part of the min-max range. With 4 levels the best range of a normal
distribution is .4 of what 1000 samples span, with 16 levels .75."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The values scale * (code - zero) with whole codes from ``lowest`` to ``highest``; scale and zero float32 [N]."""

    scale: Tensor
    zero: Tensor
    lowest: int
    highest: int

    def codes(self, rows: Tensor) -> Tensor:
        """The nearest codes of ``rows`` [N, K], float32."""
        return (torch.round(rows / self.scale[:, None]) + self.zero[:, None]).clamp(self.lowest, self.highest)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for."""
        return (codes - self.zero[:, None]) * self.scale[:, None]

    @classmethod
    def cat(cls, grids: Sequence[Grid]) -> Grid:
        """Grids of rows one after the other; all of one bit width."""
        scale, zero = (torch.cat([getattr(g, n) for g in grids]) for n in ("scale", "zero"))
        return cls(scale, zero, grids[0].lowest, grids[0].highest)

    def where(self, better: Tensor, other: Grid) -> Grid:
        """This grid's rows where ``better`` [N], the other's elsewhere."""
        pick = lambda a, b: torch.where(better, a, b)  # noqa: E731
        return Grid(pick(self.scale, other.scale), pick(self.zero, other.zero), self.lowest, self.highest)


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
    """A zero scale means a channel of zeros: any scale represents it. A subnormal one is raised to normal."""
    return torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=SMALLEST_SCALE))


def shrunk_grids(widest: Grid, bits: int, symmetric: bool, steps: int) -> Iterator[Grid]:
    """``widest`` first, then narrower ones around zero in ``steps`` steps; asymmetric ones also with their zero point
    moved by one to either side."""
    yield widest
    for factor in torch.linspace(1, SMALLEST_SHRINK[bits], steps + 1).tolist():
        scale = usable_scale(widest.scale * factor)
        for shift in (0,) if symmetric else (0, -1, 1):
            if factor < 1 or shift:
                zero = (widest.zero + shift).clamp(widest.lowest, widest.highest) if shift else widest.zero
                yield Grid(scale, zero, widest.lowest, widest.highest)


def best_grid(grids: Iterable[Grid], error: Callable[[Grid], Tensor]) -> Grid:
    """Row by row the grid of the least ``error`` [N]; of equals the first."""
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
    """The error [N] of rounding ``rows`` [N, K] to nearest in a grid: sum of squares, in units of ``unit`` [N] so that
    no weight's square leaves float32; with ``moment`` [K, K] d M d^T, the mean square of what the layer's output
    changes by (d: the change of a row, M: mean of x x^T over the layer's inputs x)."""

    def error(grid: Grid) -> Tensor:
        return output_error((grid.values(grid.codes(rows)) - rows) / unit[:, None], moment)

    return error


def output_error(change: Tensor, moment: Tensor | None) -> Tensor:
    """[N] of a change [N, K] of the weight: sum of squares, or d M d^T with ``moment``."""
    return ((change if moment is None else change @ moment) * change).sum(1)
