"""Ways to round a weight at the same bytes and speed: how the search names them, and which is best at a bit width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from ..errors import SensitivityError
from ..plan import LayerPlan, Rounding, WeightRange

if TYPE_CHECKING:
    from torch import Tensor, nn

PLAIN = "minmax nearest"
ROUNDINGS = tuple(f"{r} {how}" for how in get_args(Rounding) for r in get_args(WeightRange))
"""Every weight_range and rounding of a LayerPlan, as "range rounding"."""


def check_roundings(roundings: Sequence[str]) -> tuple[str, ...]:
    """``roundings`` without repetitions. Raises SensitivityError unless they are names of ROUNDINGS, one at least."""
    if isinstance(roundings, str) or not roundings or not all(r in ROUNDINGS for r in roundings):
        raise SensitivityError(f"roundings is {roundings!r}, expected one or more of {', '.join(map(repr, ROUNDINGS))}")
    return tuple(dict.fromkeys(roundings))


def rounded_as(layer: LayerPlan, rounding: str) -> LayerPlan:
    """``layer`` with a rounding of ROUNDINGS."""
    weight_range, how = rounding.split()
    fields: dict[str, Any] = {"weight_range": weight_range, "rounding": how}
    return replace(layer, **fields)


def usable(
    roundings: Iterable[str], name: str, module: nn.Module, moments: Mapping[str, Tensor] | None
) -> tuple[str, ...]:
    """Those that layer ``name`` can be given: without a moment of its input, and in groups, none that needs one.

    Raises SensitivityError where none is left.
    """
    moment = moments is not None and name in moments and getattr(module, "groups", 1) == 1
    found = tuple(r for r in roundings if moment or not rounded_as(LayerPlan(weight_bits=8), r).needs_moment)
    if not found:
        raise SensitivityError(
            f"layer {name!r}: roundings {', '.join(map(repr, roundings))} need the second moment of its input, which "
            f"is not there; pass moments=input_moments(...), or offer {PLAIN!r} as well"
        )
    return found


def best_of(errors: Mapping[tuple[int, str], float]) -> dict[int, str]:
    """{bits: rounding of the least error}, of equals the first; ``errors``: {(bits, rounding): error}."""
    best: dict[int, str] = {}
    for (bits, rounding), error in errors.items():
        if bits not in best or error < errors[bits, best[bits]]:
            best[bits] = rounding
    return best
