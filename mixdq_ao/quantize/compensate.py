"""Rounding with error compensation: columns are rounded in turn, and the remaining columns absorb the error.

GPTQ (Frantar et al. 2022, arXiv 2210.17323): for inputs x with second moment M = mean x x^T, the rounded weight q
should minimise the mean square change of the output w x, (q - w) M (q - w)^T. After each column the remaining ones take
the values that are optimal given those already rounded, which the Cholesky factor of M's inverse gives in closed form.
With a diagonal M this is rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid, output_error

DAMPING = 0.01
"""Added to M's diagonal, as a fraction of its mean, so that inputs never seen still have a cost. As in the paper."""
BLOCK = 64
ROOM = 1 << 25
"""Weights rounded at once when several grids are tried: a pass takes K steps, however many weights it rounds."""


@dataclass(frozen=True, slots=True)
class Compensation:
    """The factorisation of a damped moment M [K, K].

    Attributes:
        order: int64 [K], columns by decreasing second moment: the inputs that matter most are rounded while most
            columns are left to compensate.
        factor: float32 [K, K], the upper triangular U with U^T U = M^-1 in that order.
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> Compensation:
        """Factorises ``moment`` in float64. If rounding made it indefinite, raises damping tenfold until it is not."""
        damped = moment.double()
        mean = damped.diagonal().mean()
        damped = damped / mean if mean > 0 else torch.zeros_like(damped)
        order = damped.diagonal().argsort(descending=True, stable=True)
        damped, damping = damped[order][:, order], DAMPING
        while True:
            # The Cholesky factorisation from the last column to the first is M = R R^T with R upper triangular, so
            # M^-1 = R^-T R^-1.
            lower, failed = torch.linalg.cholesky_ex((damped + damping * _eye(damped)).flip(0, 1))
            if not failed:
                break
            damping *= 10
        upper = lower.flip(0, 1)
        factor = torch.linalg.solve_triangular(upper, _eye(damped), upper=True)
        return cls(order, factor.float())


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def compensated_codes(rows: Tensor, grid: Grid, compensation: Compensation) -> Tensor:
    """Codes of ``rows`` [N, K] in ``grid``, float32 [N, K].

    Works on the transpose, where a column is contiguous. A column's error is applied to the rest of its block at once,
    and to later blocks when the block is done (section 3.3 of the paper).
    """
    order, factor = compensation.order, compensation.factor
    left = rows.T[order]
    codes = torch.empty_like(left)
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        errors, diagonal = torch.empty_like(left[start:end]), factor.diagonal()[start:end].tolist()
        for j in range(start, end):
            code = torch.round(left[j] / grid.scale).add_(grid.zero).clamp_(grid.lowest, grid.highest)
            codes[j] = code
            error = torch.sub(left[j], (code - grid.zero).mul_(grid.scale), out=errors[j - start])
            error.div_(diagonal[j - start])
            left[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes[order.argsort()].T.contiguous()


def best_compensated(
    rows: Tensor, grids: Sequence[Grid], compensation: Compensation, moment: Tensor, unit: Tensor
) -> tuple[Grid, Tensor]:
    """For each row the grid whose compensated codes change the output least (the first of equals), and those codes.

    ``unit`` [N]: the unit of errors, see ``squared_error``.
    """
    at_once = max(1, ROOM // rows.numel())
    grid, codes, least = grids[0], torch.empty_like(rows), torch.full_like(unit, torch.inf)
    for start in range(0, len(grids), at_once):
        part = grids[start : start + at_once]
        many, together = rows.repeat(len(part), 1), Grid.cat(part)
        found = compensated_codes(many, together, compensation)
        errors = output_error((together.values(found) - many) / unit.repeat(len(part))[:, None], moment)
        for each, its_codes, error in zip(part, found.split(len(rows)), errors.split(len(rows)), strict=True):
            better = (error < least) | torch.isinf(least)
            grid, least = each.where(better, grid), torch.where(better, error, least)
            codes = torch.where(better[:, None], its_codes, codes)
    return grid, codes
