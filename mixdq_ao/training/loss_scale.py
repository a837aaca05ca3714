"""A loss scale for steps inside backward, where torch's GradScaler finds no gradients to inspect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import OptimizerError
from ..expect import expect


@dataclass
class LossScale:
    """Multiplies the loss so that small gradients do not underflow in float16; adapts like torch's GradScaler.

    Each tensor's gradient is checked separately: a finite one is used, one that overflowed is skipped. A pass with a
    skipped gradient multiplies the scale by ``backoff``; ``interval`` passes without one multiply it by ``growth``.
    With powers of two, scaling and unscaling are exact.

    Attributes:
        value: the scale.
        clean: number of passes since the last overflow or growth.
    """

    value: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    clean: int = 0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("value", _is_positive(self.value), "a finite number above 0"),
            ("growth", _is_positive(self.growth) and self.growth >= 1, "a finite number of at least 1"),
            ("backoff", _is_positive(self.backoff) and self.backoff < 1, "a number between 0 and 1"),
            ("interval", isinstance(self.interval, int) and self.interval > 0, "a whole number of at least 1"),
            ("clean", isinstance(self.clean, int) and self.clean >= 0, "a whole number of at least 0"),
        ):
            expect(good, f"LossScale.{name}", getattr(self, name), expected, OptimizerError)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward()`` on."""
        return loss * self.value

    def end_pass(self, overflowed: bool) -> None:
        self.clean = 0 if overflowed else self.clean + 1
        if overflowed:
            self.value *= self.backoff
        elif self.clean == self.interval:
            self.value, self.clean = self.value * self.growth, 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "clean": self.clean}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores a ``state_dict``. Raises OptimizerError for other or invalid entries, before anything is changed."""
        if not isinstance(state, Mapping) or set(state) != {"value", "clean"}:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise OptimizerError(f"LossScale: state with {found}, expected 'clean' and 'value'")
        try:
            value, clean = float(state["value"]), int(state["clean"])
        except (TypeError, ValueError, OverflowError, RuntimeError) as e:
            raise OptimizerError(f"LossScale: state {dict(state)}, expected a number for 'clean' and 'value'") from e
        new = LossScale(value, self.growth, self.backoff, self.interval, clean)
        self.value, self.clean = new.value, new.clean


def _is_positive(x: float) -> bool:
    return isinstance(x, int | float) and 0 < x < math.inf
