"""Rounding that makes up for its own error: each column is rounded, and the columns still to come absorb the error.

GPTQ (Frantar et al. 2022, arXiv 2210.17323): for inputs x with second moment M = mean x x^T, the rounded weight should
change the output w x least in the mean square, (q - w) M (q - w)^T. Columns are rounded one after the other; the
weights of the remaining columns take the values that are best given the ones already fixed, which the Cholesky factor
of M's inverse gives in closed form. With a diagonal M nothing is to be made up for: rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid, output_error

DAMPING = 0.01
"""Added to M's diagonal, as a part of its mean: inputs that were never seen still cost something. As in the paper."""
BLOCK = 64
ROOM = 1 << 25
"""Weights rounded at once where several grids are tried: each costs K steps, whatever their number."""


@dataclass(frozen=True, slots=True)
class Compensation:
    """Of a moment M [K, K], damped: ``order`` int64 [K], columns by falling second moment, so that the inputs that
    matter most are rounded while there are most columns left to make up for it; ``factor`` float32 [K, K], the upper
    triangular U with U^T U = M^-1 in that order."""

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> Compensation:
        """Computed in float64. Where rounding has left M indefinite, damping is raised tenfold until it is not."""
        damped = moment.double()
        mean = damped.diagonal().mean()
        damped = damped / mean if mean > 0 else torch.zeros_like(damped)
        order = damped.diagonal().argsort(descending=True, stable=True)
        damped, damping = damped[order][:, order], DAMPING
        while True:
            # M = R R^T with R upper triangular is the Cholesky factorisation from the last column to the first,
            # and M^-1 = R^-T R^-1.
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

    Columns are rows here, so that each lies in one piece. What a column's error does to the others of its block is
    applied at once, to all later ones when the block is done (section 3.3 of the paper).
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
    """Row by row the grid whose compensated codes change the output least, of equals the first, and those codes.

    ``unit`` [N] is what errors are measured in, see ``squared_error``.
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
