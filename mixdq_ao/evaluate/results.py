"""Stores the figures of a run, the settings they were measured with, and the influence of each picture on them.

A directory holds ``results.json`` and, for intervals of differences, ``linear/<metric>.npy`` with the influences
(``Figure.linear``). ``results.json`` is written last and holds digests of the others, so that after a crash in between
no figure is combined with the influences of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..atomicfile import replacing
from ..errors import MixDQError
from ..expect import expect, is_number
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
        figures: {name of metric: figure}.
        units: {name of metric: (which is better, unit)}, such as {"fid": ("lower", "")}.
        settings: of the run.
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
        """Writes the figures and influences; other metrics of the same settings in the directory stay."""
        known, digests = _read(directory) if (directory / FILE).exists() else (self, {})
        if known.settings != self.settings:
            known, digests = self, {}
        figures, units = {**known.figures, **self.figures}, {**known.units, **self.units}
        old = known.metadata.get("identities", {})
        identities = {n: i for n, i in old.items() if n not in self.figures} | self.metadata.get("identities", {})
        for name, figure in self.figures.items():
            path = directory / LINEAR / f"{name}.npy"
            if figure.linear is None:
                path.unlink(missing_ok=True)
            else:
                _write_linear(path, figure.linear)
                digests[name] = _digest(figure.linear)
        shown = {name: _to_json(figure, *units[name]) for name, figure in figures.items()}
        header = {"format": FORMAT, "version": VERSION, "level": LEVEL, "resamples": RESAMPLES, LINEAR: digests}
        document = {**header, "settings": self.settings.to_json(), "metrics": shown, **self.metadata}
        write_document(directory / FILE, {**document, "identities": identities})

    @classmethod
    def load(cls, directory: Path) -> Results:
        """Reads a directory. Raises MixDQError naming the file if it is missing or damaged."""
        found, digests = _read(directory)
        figures = dict(found.figures)
        for name, figure in found.figures.items():
            if figure.interval is not None:
                linear = _linear(directory / LINEAR / f"{name}.npy", figure.count, digests.get(name))
                figures[name] = replace(figure, linear=linear)
        return replace(found, figures=figures)


def _read(directory: Path) -> tuple[Results, dict[str, str]]:
    """The figures without influences, and the digests of these by metric."""
    path = directory / FILE
    if not path.exists():
        raise MixDQError(f"{directory}: has no {FILE}; expected the directory of a finished mixdq evaluate run")
    document = read_document(path, FORMAT, VERSION, MixDQError)
    settings, metrics = document.pop("settings", None), document.pop("metrics", None)
    if not isinstance(settings, dict) or not isinstance(metrics, dict):
        raise MixDQError(f"{path}: settings or metrics is missing, expected an object each")
    digests = document.pop(LINEAR, None)
    for name, value in ((LINEAR, digests), ("identities", document.get("identities", {}))):
        if not isinstance(value, dict):
            raise MixDQError(f"{path}: {name} is {value!r:.60}, expected an object")
    figures = {name: _from_json(f"{path}: {name!r}", value) for name, value in metrics.items()}
    units = {name: (value["better"], value["unit"]) for name, value in metrics.items()}
    metadata = {k: v for k, v in document.items() if k not in ("format", "version", "level", "resamples")}
    return Results(figures, units, Settings.from_json(path, settings), metadata), digests


def _to_json(figure: Figure, better: str, unit: str) -> dict[str, Any]:
    bounds = None if figure.interval is None else list(figure.interval)
    shown = {"value": figure.value, "interval": bounds, "pictures": figure.count, "better": better, "unit": unit}
    return {**shown, "against": dict(figure.against)}


def _from_json(where: str, document: Any) -> Figure:
    keys = {"value", "interval", "pictures", "better", "unit", "against"}
    if not isinstance(document, dict) or set(document) != keys:
        raise MixDQError(f"{where}: expected an object with {sorted(keys)}")
    value, bounds, count, against = (document[n] for n in ("value", "interval", "pictures", "against"))
    texts = isinstance(against, dict) and all(isinstance(text, str) for text in against.values())
    ends = isinstance(bounds, list) and len(bounds) == 2 and all(map(is_number, bounds)) and bounds[0] <= bounds[1]
    for name, right, expected in (
        ("value", is_number(value), "a finite number"),
        ("interval", bounds is None or ends, "two finite numbers, the lower first, or null"),
        ("pictures", type(count) is int and count > 0, "a whole number of at least 1"),
        ("better", document["better"] in ("higher", "lower"), "'higher' or 'lower'"),
        ("unit", isinstance(document["unit"], str), "a text"),
        ("against", texts, "an object of texts"),
    ):
        expect(right, f"{where}: {name}", document[name], expected)
    return Figure(value, None if bounds is None else Interval(*bounds), count, None, against)


def _write_linear(path: Path, linear: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.save(file, linear, allow_pickle=False)


def _linear(path: Path, count: int, digest: str | None) -> np.ndarray | None:
    """The influences [count]; None if there is no file. Raises MixDQError unless the file has this digest."""
    again = f"measure {path.stem} again with mixdq evaluate run"
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file:
            linear = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as e:  # of many classes: numpy parses a header as Python
        raise MixDQError(f"{path}: cannot be read: {e}; {again}") from e
    if linear.shape != (count,) or linear.dtype != np.float64:
        raise MixDQError(f"{path}: is {linear.dtype} {linear.shape}, expected float64 ({count},); {again}")
    if digest != _digest(linear):
        raise MixDQError(f"{path}: is not what {FILE} was written with; {again}")
    return linear


def _digest(linear: np.ndarray) -> str:
    return hashlib.blake2b(linear.tobytes(), digest_size=16).hexdigest()
