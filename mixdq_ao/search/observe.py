"""The running range of a layer's input during calibration, in O(1) memory: the input itself is never kept."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..expect import expect

RangeMethod = Literal["minmax", "percentile", "mse"]
BINS = 4096
EXACT = 1 << 24
"""Largest count that float32, in which ``torch.histc`` counts, holds exactly."""
TAIL = 1e-4
"""Share of values that "percentile" clips at either end; chosen by convention, not measured here."""


def check_method(method: object) -> None:
    """Raises CalibrationError unless ``method`` is a RangeMethod."""
    known = get_args(RangeMethod)
    expect(method in known, "method", method, f"one of {', '.join(known)}", CalibrationError)


class RangeObserver:
    """Running range of a stream of tensors.

    Keeps the exact minimum and maximum and, where the method needs it, a histogram of BINS bins over [-m, m]. Where a
    value falls outside, m is doubled and pairs of bins are merged. Zeros are counted apart, as they round exactly.

    Raises CalibrationError for an unknown method.
    """

    def __init__(self, method: RangeMethod = "minmax") -> None:
        check_method(method)
        self.method: RangeMethod = method
        self.lo, self.hi = float("inf"), float("-inf")
        self.limit = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.zeros = 0.0

    def update(self, x: Tensor) -> None:
        """Adds a tensor of any shape (empty ones change nothing)."""
        if x.numel() == 0:
            return
        x = x.detach().float()
        lo, hi = torch.stack(torch.aminmax(x)).tolist()
        if lo != lo:  # NaN, which min and max would pass over
            lo, hi = float("-inf"), float("inf")
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        if self.method != "minmax" and hi - lo < float("inf"):
            self._widen(max(abs(lo), abs(hi)))
            self._count(x.flatten())

    def _count(self, x: Tensor) -> None:
        """Adds a tensor [n] to the histogram. Zeros are taken out of the bin that ``torch.histc`` puts them in."""
        if self.limit == 0.0:
            self.zeros += len(x)
            return

        def bins(values: Tensor) -> Tensor:
            return torch.histc(values, BINS, -self.limit, self.limit).double()

        zeros = torch.count_nonzero(x == 0).double()
        counts = torch.stack([bins(part) for part in x.split(EXACT)]).sum(0) - zeros * bins(x.new_zeros(1))
        found = torch.cat([counts, zeros[None]]).cpu()
        self.counts += found[:BINS]
        self.zeros += found[BINS].item()

    def _widen(self, needed: float) -> None:
        if self.limit == 0.0:
            self.limit = needed
        while self.limit < needed:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : BINS // 4 * 3] = merged
            self.limit *= 2

    @property
    def empty(self) -> bool:
        return self.lo > self.hi

    def range(self, bits: int = 8) -> tuple[float, float]:
        """(lo, hi) by the method: the extremes ("minmax", and wherever one is not finite); the 0.01 % and 99.99 %
        quantiles ("percentile"); or the clipping range with the smallest squared error at ``bits`` ("mse": both ends
        are shrunk together in 100 steps; rounding plus clipping error from the histogram)."""
        if self.method == "minmax" or not math.isfinite(self.hi - self.lo) or self.counts.sum() == 0:
            return self.lo, self.hi
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * self.limit / BINS) - self.limit
        if self.method == "percentile":
            middle, zeros = BINS // 2, self.counts.new_tensor([self.zeros])
            share = torch.cat([self.counts[:middle], zeros, self.counts[middle:]]).cumsum(0)
            share, values = share / share[-1], torch.cat([centres[:middle], torch.zeros_like(zeros), centres[middle:]])
            ends = int(torch.searchsorted(share, TAIL)), min(int(torch.searchsorted(share, 1 - TAIL)), BINS)
            # The centre of the outermost bin may lie beyond the extreme in it, at either end.
            lo, hi = (min(max(values[end].item(), self.lo), self.hi) for end in ends)
            return lo, hi
        shrink = torch.linspace(0.01, 1, 100, dtype=torch.float64)[:, None]
        lo, hi = min(self.lo, 0.0) * shrink, max(self.hi, 0.0) * shrink
        step = (hi - lo) / (2**bits - 1)
        clipped = centres.clamp(lo, hi)
        error = ((clipped - centres).square() + step.square() / 12 * (clipped == centres)) @ self.counts
        best = int(error.argmin())
        return lo[best].item(), hi[best].item()
