"""Clips gradients that never exist all at once: by each tensor's norm, or by a running estimate of the total norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from ..errors import OptimizerError

KINDS = ("running", "tensor")
STATE = "grad_square"
"""Name in a parameter's state of a float64 scalar, the square of its gradient's norm in the last pass."""


def clip_factor(norm: float, max_norm: float) -> float:
    """The factor of torch.nn.utils.clip_grad_norm_: max_norm / (norm + 1e-6), at most 1; NaN for a NaN norm."""
    return min(max_norm / (norm + 1e-6), 1.0)


States = Mapping[Tensor, dict[str, Any]]


class TensorClip:
    """Clips every tensor's gradient to a norm of at most ``max_norm``."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def factor(self, p: Tensor, square: float, states: States) -> float:
        """The factor for the gradient of ``p``; ``square`` is the square of its norm."""
        return clip_factor(math.sqrt(square), self.max_norm)

    def end_pass(self, seen: Set[Tensor], states: States) -> None:
        """Called when all gradients of a pass have been used; ``seen`` are the parameters that had one."""

    def forget_pass(self) -> None:
        """Called before a new pass."""


class RunningClip(TensorClip):
    """Clips all gradients to a total norm of ``max_norm``, by the current estimate of the total.

    The estimate takes the norms of this pass for tensors whose gradient is complete, and of the last pass for the
    others: it is exact for the last tensor of a pass, and mostly the last pass's total for the first. In the very
    first pass gradients still to come count as zero. A tensor's own gradient is always included, so a spike is never
    unclipped. A NaN or infinite norm (nonfinite="propagate") affects only its own tensor.
    """

    def __init__(self, max_norm: float) -> None:
        super().__init__(max_norm)
        self._total: int | None = (
            None  # in _units: exact, so that a spike leaves no rounding error once it is subtracted
        )

    def factor(self, p: Tensor, square: float, states: States) -> float:
        if self._total is None:
            self._total = sum(_units(float(state[STATE])) for state in states.values() if STATE in state)
        known = square if math.isfinite(square) else 0.0
        self._total += _units(known) - _units(float(states[p].get(STATE, 0.0)))
        states[p][STATE] = torch.tensor(known, dtype=torch.float64)
        return clip_factor(math.sqrt(self._total / _units(1.0) if math.isfinite(square) else square), self.max_norm)

    def end_pass(self, seen: Set[Tensor], states: States) -> None:
        """Counts a tensor without a gradient in this pass as zero in the next."""
        for p, state in states.items():
            if p not in seen and STATE in state:
                state[STATE] = torch.zeros((), dtype=torch.float64)

    def forget_pass(self) -> None:
        self._total = None


def _units(x: float) -> int:
    """A finite float as an integer multiple of the smallest one, 2^-1074; integers add up exactly."""
    numerator, denominator = x.as_integer_ratio()
    return numerator << 1075 - denominator.bit_length()


def make_clip(kind: str, max_norm: float | None) -> TensorClip | None:
    """The clip of a kind; None without a norm. Raises OptimizerError for an unknown kind or a norm that is not a
    positive number."""
    if kind not in KINDS:
        raise OptimizerError(f"clip: {kind!r}, expected one of {', '.join(KINDS)}")
    if max_norm is None:
        return None
    if not (isinstance(max_norm, int | float) and 0 < max_norm < math.inf):
        raise OptimizerError(f"max_norm: {max_norm!r}, expected a positive number, or None not to clip")
    return {"running": RunningClip, "tensor": TensorClip}[kind](float(max_norm))
