"""Checks of arguments and of fields read from disk. Each raises the caller's kind of error, naming the field, the value
and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

from .errors import MixDQError


def expect(good: bool, name: str, value: object, expected: str, error: type[Exception] = MixDQError) -> None:
    """Raises ``error`` unless ``good``."""
    if not good:
        raise error(f"{name} is {value!r:.100}, expected {expected}")


def whole(value: object, name: str, *, least: int = 1, error: type[Exception] = MixDQError) -> int:
    """``value``, a whole number of at least ``least``; booleans are none. Raises ``error`` for anything else."""
    if type(value) is not int or value < least:
        raise error(f"{name} is {value!r:.100}, expected a whole number of at least {least}")
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number that float64 holds (integers have no limits in JSON); booleans are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


@contextmanager
def located(where: str, *kinds: type[MixDQError]) -> Iterator[None]:
    """Errors of these kinds raised in the block say ``where`` first, as in "layer 'conv_in': ..."."""
    try:
        yield
    except kinds as e:
        raise type(e)(f"{where}: {e}") from e
