"""The figures of a run in a file, with what they were measured on, and what each picture adds to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MixDQError
from ..jsonfile import read_document, write_document
from .bootstrap import LEVEL, RESAMPLES, Interval
from .metric import Figure, Metric
from .settings import Settings

FORMAT, VERSION = "mixdq-evaluation", 1
FILE, LINEAR = "results.json", "linear"


@dataclass(frozen=True, slots=True)
class Results:
    """Figures by metric.

    Attributes:
        figures: by name of metric.
        units: by name of metric, as "higher" or "lower" is better, and the unit: {"fid": ("lower", "")}.
        settings: what the pictures depend on.
        metadata: command, machine, versions, commit, identities of the metrics.
    """

    figures: Mapping[str, Figure]
    units: Mapping[str, tuple[str, str]]
    settings: Settings
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, figures: Mapping[str, Figure], metrics: Mapping[str, Metric], settings: Settings, **more: Any
    ) -> Results:
        units = {name: (m.better, m.unit) for name, m in metrics.items()}
        identities = {name: dict(m.identity) for name, m in metrics.items()}
        return cls(figures, units, settings, {"identities": identities, **more})

    def save(self, directory: Path) -> None:
        """Writes results.json, and linear/<metric>.npy for intervals of differences; metrics that were there stay."""
        known = Results.load(directory) if (directory / FILE).exists() else None
        figures, units = dict(self.figures), dict(self.units)
        metadata = {k: dict(v) if k == "identities" else v for k, v in self.metadata.items()}
        if known is not None and known.settings == self.settings:
            figures, units = {**known.figures, **figures}, {**known.units, **units}
            metadata["identities"] = {**known.metadata.get("identities", {}), **metadata.get("identities", {})}
        (directory / LINEAR).mkdir(parents=True, exist_ok=True)
        for name, figure in self.figures.items():
            path = directory / LINEAR / f"{name}.npy"
            if figure.linear is None:
                path.unlink(missing_ok=True)
            else:
                np.save(path, figure.linear, allow_pickle=False)
        shown = {name: _to_json(figure, *units[name]) for name, figure in figures.items()}
        header = {"format": FORMAT, "version": VERSION, "level": LEVEL, "resamples": RESAMPLES}
        write_document(directory / FILE, {**header, "settings": self.settings.to_json(), "metrics": shown, **metadata})

    @classmethod
    def load(cls, directory: Path) -> Results:
        """Raises MixDQError naming the file where there are none, or they are not as written."""
        path = directory / FILE
        if not path.exists():
            raise MixDQError(f"{directory}: has no {FILE}; expected the directory of a finished mixdq evaluate run")
        document = read_document(path, FORMAT, VERSION, MixDQError)
        settings, metrics = document.pop("settings", None), document.pop("metrics", None)
        if not isinstance(settings, dict) or not isinstance(metrics, dict):
            raise MixDQError(f"{path}: settings or metrics is missing, expected an object each")
        figures = {name: _from_json(path, name, value, directory) for name, value in metrics.items()}
        units = {name: (value["better"], value["unit"]) for name, value in metrics.items()}
        metadata = {k: v for k, v in document.items() if k not in ("format", "version", "level", "resamples")}
        return cls(figures, units, Settings.from_json(path, settings), metadata)


def _to_json(figure: Figure, better: str, unit: str) -> dict[str, Any]:
    bounds = None if figure.interval is None else list(figure.interval)
    return {"value": figure.value, "interval": bounds, "pictures": figure.count, "better": better, "unit": unit}


def _from_json(path: Path, name: str, value: Any, directory: Path) -> Figure:
    keys = {"value", "interval", "pictures", "better", "unit"}
    if not isinstance(value, dict) or set(value) != keys:
        raise MixDQError(f"{path}: {name!r}: expected an object with {sorted(keys)}")
    bounds, count = value["interval"], value["pictures"]
    numbers = [value["value"], *(bounds or ())]
    if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers) or len(numbers) not in (1, 3):
        raise MixDQError(f"{path}: {name!r}: value and interval are {numbers!r:.80}, expected one and two numbers")
    linear = _linear(directory / LINEAR / f"{name}.npy", count) if bounds is not None else None
    return Figure(value["value"], None if bounds is None else Interval(*bounds), count, linear)


def _linear(path: Path, count: int) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        linear = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise MixDQError(f"{path}: cannot be read: {e}; run mixdq evaluate run again") from e
    if linear.shape != (count,) or linear.dtype != np.float64:
        raise MixDQError(f"{path}: is {linear.dtype} {linear.shape}, expected float64 ({count},); run again")
    return linear
