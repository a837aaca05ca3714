"""Clipping gradients that are never all there at once: tensor by tensor, or by a norm that is kept up to date."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from ..errors import OptimizerError

KINDS = ("running", "tensor")
STATE = "grad_square"
"""In a parameter's state: float64 scalar, the square of its gradient's norm in the last pass."""


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply a gradient with, as torch.nn.utils.clip_grad_norm_ does: max_norm / (norm + 1e-6), at most 1.

    NaN for a norm that is NaN.
    """
    return min(max_norm / (norm + 1e-6), 1.0)


States = Mapping[Tensor, dict[str, Any]]


class TensorClip:
    """Every tensor's gradient to a norm of at most ``max_norm``."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def factor(self, p: Tensor, square: float, states: States) -> float:
        """What to multiply the gradient of ``p`` with, whose norm is the root of ``square``."""
        return clip_factor(math.sqrt(square), self.max_norm)

    def end_pass(self, seen: Set[Tensor], states: States) -> None:
        """All gradients of a pass have been used."""

    def forget_pass(self) -> None:
        """A new pass begins."""


class RunningClip(TensorClip):
    """All gradients to a total norm of ``max_norm``, by the best estimate of it at each moment.

    The total is this pass's norms of the tensors that have had their gradients, and the last pass's of those still to
    come: exact for the last tensor of a pass, mostly the last pass's norm for the first. In the very first pass what
    is still to come counts as zero. A tensor's own gradient counts as it is, so a spike never passes unclipped. A NaN
    or infinite norm (nonfinite="propagate") counts for its own tensor alone.
    """

    def __init__(self, max_norm: float) -> None:
        super().__init__(max_norm)
        self._total: int | None = None  # in _units: a spike that is taken off again leaves no rounding error behind

    def factor(self, p: Tensor, square: float, states: States) -> float:
        if self._total is None:
            self._total = sum(_units(float(state[STATE])) for state in states.values() if STATE in state)
        known = square if math.isfinite(square) else 0.0
        self._total += _units(known) - _units(float(states[p].get(STATE, 0.0)))
        states[p][STATE] = torch.tensor(known, dtype=torch.float64)
        return clip_factor(math.sqrt(self._total / _units(1.0) if math.isfinite(square) else square), self.max_norm)

    def end_pass(self, seen: Set[Tensor], states: States) -> None:
        """A tensor without a gradient in this pass counts as zero in the next."""
        for p, state in states.items():
            if p not in seen and STATE in state:
                state[STATE] = torch.zeros((), dtype=torch.float64)

    def forget_pass(self) -> None:
        self._total = None


def _units(x: float) -> int:
    """A finite float as a multiple of the smallest one, 2^-1074: these add up exactly."""
    numerator, denominator = x.as_integer_ratio()
    return numerator << 1075 - denominator.bit_length()


def make_clip(kind: str, max_norm: float | None) -> TensorClip | None:
    """Raises OptimizerError for an unknown kind or a norm that is not a positive number."""
    if kind not in KINDS:
        raise OptimizerError(f"clip: {kind!r}, expected one of {', '.join(KINDS)}")
    if max_norm is None:
        return None
    if not (isinstance(max_norm, int | float) and 0 < max_norm < math.inf):
        raise OptimizerError(f"max_norm: {max_norm!r}, expected a positive number, or None not to clip")
    return {"running": RunningClip, "tensor": TensorClip}[kind](float(max_norm))
