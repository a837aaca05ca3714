"""A Sensitivity from the estimates of random probes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..layers import Group, GroupRule, LayerShape, stored_bytes
from ..plan import LayerPlan
from .calibration import Calibration
from .probe_delta import LayerDeltas
from .probe_stats import Estimates, Key
from .sensitivity import ERROR_FLOOR, Kind, LayerSensitivity, Sensitivity, sqnr_from_error


def to_sensitivity(
    estimates: Estimates,
    deltas: Mapping[str, LayerDeltas],
    calibration: Calibration,
    rule: GroupRule,
    metadata: Mapping[str, Any],
) -> Sensitivity:
    """Error powers of the outputs, scores by group, and the figures' reliability in the metadata."""
    values = dict(zip(estimates.keys, estimates.values.tolist(), strict=True))
    names = dict.fromkeys(name for name, *_ in estimates.keys)
    layers = {n: _layer(n, values, deltas[n], calibration, rule(n)) for n in names}
    return Sensitivity(layers, {**metadata, **_figures(estimates)})


def psnr_from_mse(mse: float) -> float:
    """dB of a mean squared error of pictures in [0, 1]; at most 120, where float32 arithmetic itself decides."""
    return -10.0 * math.log10(max(mse, ERROR_FLOOR))


def _layer(
    name: str, values: Mapping[Key, float], deltas: LayerDeltas, calibration: Calibration, group: Group
) -> LayerSensitivity:
    shape, own = LayerShape.of(deltas.module), calibration.layers[name]

    def table(kind: Kind, target: str) -> dict[int, float]:
        widths = [choice.bits for choice in deltas.choices if choice.kind == kind]
        return {bits: values[name, kind, bits, target] for bits in widths}

    def scores(kind: Kind) -> dict[int, float]:
        if group == "content":
            return {bits: psnr_from_mse(mse) for bits, mse in table(kind, "picture").items()}
        return {bits: sqnr_from_error(error) for bits, error in table(kind, "output").items()}

    plan = lambda bits: own.plan(LayerPlan(weight_bits=bits, act_bits=8), bos=True, split=True)  # noqa: E731
    return LayerSensitivity(
        group=group,
        weight_size=shape.weights,
        act_size=own.act_size,
        weight_scores=scores("weight"),
        act_scores=scores("act"),
        weight_errors=table("weight", "output"),
        act_errors=table("act", "output"),
        weight_bytes={bits: stored_bytes(shape, plan(bits)) for bits in sorted(table("weight", "output"))},
    )


def _figures(estimates: Estimates) -> dict[str, Any]:
    settled = {f"{kind}|{bits}|{target}": r for (kind, bits, target), r in estimates.settled.items()}
    return {
        "probes": len(estimates.second),
        "settled": settled,
        "content_score": "psnr",
        "standard_errors": _nested(estimates, "output", estimates.standard_errors.tolist()),
        "picture_errors": _nested(estimates, "picture", estimates.values.tolist()),
        "picture_standard_errors": _nested(estimates, "picture", estimates.standard_errors.tolist()),
    }


def _nested(estimates: Estimates, wanted: str, values: list[float]) -> dict[str, dict[str, dict[str, float]]]:
    """{layer: {kind: {bits: value}}} as JSON keeps it."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for (name, kind, bits, target), value in zip(estimates.keys, values, strict=True):
        if target == wanted:
            result.setdefault(name, {}).setdefault(kind, {})[str(bits)] = value
    return result
