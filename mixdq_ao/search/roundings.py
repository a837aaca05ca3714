"""Names of the ways to round a weight, at equal bytes and speed, and the choice of the best per bit width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from ..errors import SensitivityError
from ..layer_plan import LayerPlan, Rounding, WeightRange

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
    """A copy of ``layer`` with one of ROUNDINGS."""
    weight_range, how = rounding.split()
    fields: dict[str, Any] = {"weight_range": weight_range, "rounding": how}
    return replace(layer, **fields)


def usable(
    roundings: Iterable[str], name: str, module: nn.Module, moments: Mapping[str, Tensor] | None
) -> tuple[str, ...]:
    """The roundings that layer ``name`` can use: without a moment of its input, or for a grouped convolution, those
    that need no moment; PLAIN where none is left.

    Raises SensitivityError where moments are needed and ``moments`` is None.
    """
    needy = {r for r in roundings if rounded_as(LayerPlan(weight_bits=8), r).needs_moment}
    if needy and moments is None:
        raise SensitivityError(
            f"roundings {', '.join(map(repr, sorted(needy)))} need second moments; pass moments=input_moments(...)"
        )
    moment = moments is not None and name in moments and getattr(module, "groups", 1) == 1
    return tuple(r for r in roundings if moment or r not in needy) or (PLAIN,)


def best_of(errors: Mapping[tuple[int, str], float]) -> dict[int, str]:
    """{bits: rounding with the least error}, of equal ones the first; ``errors``: {(bits, rounding): error}."""
    best: dict[int, str] = {}
    for (bits, rounding), error in errors.items():
        if bits not in best or error < errors[bits, best[bits]]:
            best[bits] = rounding
    return best
