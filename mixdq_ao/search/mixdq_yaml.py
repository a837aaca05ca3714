"""The MixDQ authors' sensitivity files: ``model.<layer>: [at 2, at 4, at 8 bits]`` and relative sizes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import SensitivityError
from ..importing import read_layer_map, shown
from .sensitivity import LayerSensitivity, Sensitivity, error_from_sqnr

PathLike = str | os.PathLike[str]
BITS = (2, 4, 8)
WEIGHT_UNIT = 11520
"""Weights of the published size 1 (SDXL's conv_in: 320 x 4 x 3 x 3)."""
ACT_UNIT = 320
"""Input elements of the published size 1 (a time embedding's 320 features)."""
FLOOR_WINDOW = 0.5
"""The noise floor is this many dB below the best SQNR in the files (the published ones saturate at 83.9 dB)."""

Table = dict[str, tuple[float, ...]]


def sensitivity_from_mixdq_yaml(
    weight_ssim: PathLike,
    weight_sqnr: PathLike,
    act_ssim: PathLike,
    act_sqnr: PathLike,
    weight_ratio: PathLike,
    act_ratio: PathLike,
) -> Sensitivity:
    """Reads a Sensitivity from the published files.

    Layers in the SSIM files are the content group, all others the quality group; the SQNR files name every layer,
    so the error power 10^(-dB / 10) of every layer is known. Sizes are the published ratios times 11520 weights
    and 320 input elements (a 64 x 64 latent). Raises SensitivityError naming file, layer, value and expectation.
    """
    scores = {path: _read_scores(path) for path in (weight_ssim, weight_sqnr, act_ssim, act_sqnr)}
    weights, acts = _read_sizes(weight_ratio, WEIGHT_UNIT), _read_sizes(act_ratio, ACT_UNIT)
    for path, table in ((act_sqnr, scores[act_sqnr]), (weight_ratio, weights), (act_ratio, acts)):
        _same_layers(path, table, weight_sqnr, scores[weight_sqnr])
    _same_layers(act_ssim, scores[act_ssim], weight_ssim, scores[weight_ssim])
    if extra := set(scores[weight_ssim]) - set(scores[weight_sqnr]):
        raise SensitivityError(f"{os.fspath(weight_ssim)}: layer {min(extra)!r} is missing in {os.fspath(weight_sqnr)}")

    def layer(name: str) -> LayerSensitivity:
        content = name in scores[weight_ssim]
        return LayerSensitivity(
            group="content" if content else "quality",
            weight_size=weights[name],
            act_size=acts[name],
            weight_scores=_by_bits(scores[weight_ssim if content else weight_sqnr][name]),
            act_scores=_by_bits(scores[act_ssim if content else act_sqnr][name]),
            weight_errors=_by_bits(map(error_from_sqnr, scores[weight_sqnr][name])),
            act_errors=_by_bits(map(error_from_sqnr, scores[act_sqnr][name])),
        )

    best = max(max(row) for path in (weight_sqnr, act_sqnr) for row in scores[path].values())
    files = (weight_ssim, weight_sqnr, act_ssim, act_sqnr, weight_ratio, act_ratio)
    metadata = {
        "source": "MixDQ YAML",
        "files": [Path(f).name for f in files],
        "noise_floor": error_from_sqnr(best - FLOOR_WINDOW),
    }
    return Sensitivity({name: layer(name) for name in scores[weight_sqnr]}, metadata)


def _by_bits(values: Iterable[float]) -> dict[int, float]:
    return dict(zip(BITS, values, strict=True))


def _read_scores(path: PathLike) -> Table:
    table: Table = {}
    for name, values in read_layer_map(path, SensitivityError).items():
        if not isinstance(values, list) or len(values) != len(BITS) or not all(map(_is_score, values)):
            raise SensitivityError(
                f"{os.fspath(path)}: layer {name!r}: is {shown(values)}, "
                "expected three finite numbers [at 2, at 4, at 8 bits]"
            )
        table[name] = tuple(float(v) for v in values)
    return table


def _is_score(value: object) -> bool:
    """SSIM and SQNR in dB both lie well within +-1000; this keeps 10^(-dB / 10) finite too."""
    return type(value) in (int, float) and -1000.0 < value < 1000.0  # type: ignore[operator]


def _read_sizes(path: PathLike, unit: int) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, ratio in read_layer_map(path, SensitivityError).items():
        if type(ratio) not in (int, float) or not 0 < ratio < 2**40 or round(ratio * unit) < 1:
            raise SensitivityError(
                f"{os.fspath(path)}: layer {name!r}: size is {shown(ratio)}, expected a positive number"
            )
        sizes[name] = round(ratio * unit)
    return sizes


def _same_layers(path: PathLike, table: dict[str, Any], other: PathLike, reference: dict[str, Any]) -> None:
    for file, lacking, source in (
        (path, set(reference) - set(table), other),
        (other, set(table) - set(reference), path),
    ):
        if lacking:
            raise SensitivityError(
                f"{os.fspath(file)}: layer {min(lacking)!r} is missing, which {os.fspath(source)} has; "
                "are they of one model?"
            )
