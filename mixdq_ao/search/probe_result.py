"""A Sensitivity from the estimates of random probes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..layers import Group, GroupRule
from .calibration import Calibration, LayerCalibration
from .layer_sensitivity import layer_sensitivity
from .probe_delta import LayerDeltas
from .probe_stats import Estimates, Key
from .roundings import PLAIN
from .sensitivity import ERROR_FLOOR, LayerSensitivity, Sensitivity, sqnr_from_error


def to_sensitivity(
    estimates: Estimates,
    deltas: Mapping[str, LayerDeltas],
    calibration: Calibration,
    rule: GroupRule,
    metadata: Mapping[str, Any],
) -> Sensitivity:
    """The Sensitivity with error powers of the outputs, scores by group, and standard errors in the metadata."""
    values = dict(zip(estimates.keys, estimates.values.tolist(), strict=True))
    names = dict.fromkeys(name for name, *_ in estimates.keys)
    layers = {n: _layer(n, values, deltas[n], calibration.layers[n], rule(n)) for n in names}
    return Sensitivity(layers, {**metadata, **_figures(estimates, deltas, layers)})


def psnr_from_mse(mse: float) -> float:
    """PSNR in dB of a mean squared error of pictures in [0, 1]; at most 120, as float32 rounds by as much."""
    return -10.0 * math.log10(max(mse, ERROR_FLOOR))


def _layer(
    name: str, values: Mapping[Key, float], deltas: LayerDeltas, own: LayerCalibration, group: Group
) -> LayerSensitivity:
    errors = {c: values[name, c.kind, c.label, "output"] for c in deltas.choices}
    if group == "content":
        scores = {c: psnr_from_mse(values[name, c.kind, c.label, "picture"]) for c in deltas.choices}
    else:
        scores = {c: sqnr_from_error(error) for c, error in errors.items()}
    return layer_sensitivity(deltas.module, own, group, errors, scores)


def _figures(
    estimates: Estimates, deltas: Mapping[str, LayerDeltas], layers: Mapping[str, LayerSensitivity]
) -> dict[str, Any]:
    kept = {
        (c.name, c.kind, c.label): str(c.bits)
        for name, layer in layers.items()
        for c in deltas[name].choices
        if c.kind == "act" or c.rounding == layer.rounding(c.bits)
    }
    values, spread = estimates.values.tolist(), estimates.standard_errors.tolist()
    figures = {
        "probes": len(estimates.second),
        "settled": {f"{kind}|{label}|{target}": r for (kind, label, target), r in estimates.settled.items()},
        "content_score": "psnr",
        "standard_errors": _nested(estimates, "output", spread, kept),
        "picture_errors": _nested(estimates, "picture", values, kept),
        "picture_standard_errors": _nested(estimates, "picture", spread, kept),
    }
    if any(c.rounding != PLAIN for d in deltas.values() for c in d.choices):
        every = {(c.name, c.kind, c.label): f"{c.bits} {c.rounding}" for n in layers for c in deltas[n].choices}
        weights = {key: label for key, label in every.items() if key[1] == "weight"}
        figures["rounding_errors"] = _nested(estimates, "output", values, weights)
    return figures


def _nested(
    estimates: Estimates, wanted: str, values: list[float], labels: Mapping[tuple[str, str, str], str]
) -> dict[str, dict[str, dict[str, float]]]:
    """{layer: {kind: {label: value}}}, ready for JSON, of the choices in ``labels``."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for (name, kind, label, target), value in zip(estimates.keys, values, strict=True):
        if target == wanted and (name, kind, label) in labels:
            result.setdefault(name, {}).setdefault(kind, {})[labels[name, kind, label]] = value
    return result
