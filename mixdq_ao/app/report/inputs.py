"""Reads and checks the files of a report. A missing file drops its section; a broken one is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MixDQError
from ...jsonfile import read_object
from ...plan import Plan
from ...search.sensitivity import Sensitivity
from ...temporal.plan import TemporalPlan
from ...temporal.results import ScheduleResults
from .grid import Grid, read_grid
from .names import plan_order

if TYPE_CHECKING:
    from ...search.orthogonality import Orthogonality


SHOWN = ("variants", "sensitivity", "plans", "points", "grid", "schedules", "schedule_results", "orthogonality")
"""Inputs of which at least one must be present."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Measurements of one variant; None for those not taken. ``agreement`` is a fraction, ``speedup`` a factor."""

    agreement: float | None = None
    ssim: float | None = None
    psnr: float | None = None
    frechet: float | None = None
    weight_bytes: float | None = None
    average_weight_bits: float | None = None
    average_act_bits: float | None = None
    latency_ms: float | None = None
    speedup: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One plan of the Pareto front."""

    objective: str
    weight_bits: float
    weight_bytes: float
    predicted_error: float | None = None
    measured_error: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Everything found in the folder; empty or None for missing files."""

    variants: Mapping[str, Figures] = field(default_factory=dict)
    one_step: Mapping[str, Figures] = field(default_factory=dict)
    ablation: Mapping[str, Figures] = field(default_factory=dict)
    ablation_one_step: Mapping[str, Figures] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    plans: Mapping[str, Plan] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    grid: Grid | None = None
    schedules: Mapping[str, TemporalPlan] = field(default_factory=dict)
    schedule_results: tuple[ScheduleResults, ...] = ()
    orthogonality: Orthogonality | None = None


def read_inputs(directory: Path) -> Inputs:
    """Reads the inputs in a folder. Raises MixDQError naming the file and what was expected, also if the folder holds
    nothing to report."""
    if not directory.is_dir():
        raise MixDQError(f"{directory}: is no folder, expected one with results.json or other results")
    results = _optional(directory / "results.json", _read, {})
    where = directory / "results.json"
    schedules = [_schedule(path) for path in sorted(directory.glob("schedule*.json"))]
    inputs = Inputs(
        variants=_figures(where, results, "variants"),
        one_step=_figures(where, results, "variants_1_step"),
        ablation=_figures(where, results, "ablation"),
        ablation_one_step=_figures(where, results, "ablation_1_step"),
        environment=_object(where, results, "environment"),
        sensitivity=_optional(directory / "sensitivity.json", Sensitivity.load, None),
        plans={path.stem: Plan.load(path) for path in sorted(directory.glob("plan_*.json"), key=plan_order)},
        points=_optional(directory / "pareto.json", _points, ()),
        grid=read_grid(directory / "grid.png", _optional(directory / "grid.json", _read, None)),
        schedules={name: found for name, found in schedules if isinstance(found, TemporalPlan)},
        schedule_results=tuple(found for _, found in schedules if isinstance(found, ScheduleResults)),
        orthogonality=_optional(directory / "orthogonality.json", _orthogonality, None),
    )
    if not any(getattr(inputs, name) for name in SHOWN):
        raise MixDQError(
            f"{directory}: holds nothing to report, expected results.json, sensitivity.json, plan_*.json, "
            "schedule*.json or orthogonality.json"
        )
    return inputs


def _schedule(path: Path) -> tuple[str, TemporalPlan | ScheduleResults]:
    """The name of a file and its contents: a schedule or results of schedules, as its "format" says."""
    kind, expected = _read(path).get("format"), (TemporalPlan.FORMAT, ScheduleResults.FORMAT)
    if kind not in expected:
        raise MixDQError(f"{path}: format is {kind!r:.60}, expected {' or '.join(expected)}")
    return path.stem, (TemporalPlan if kind == TemporalPlan.FORMAT else ScheduleResults).load(path)


def _orthogonality(path: Path) -> Orthogonality:
    from ...search.orthogonality import Orthogonality  # imports torch, which other pages do not need

    return Orthogonality.load(path)


def _optional(path: Path, read: Callable[[Path], Any], default: Any) -> Any:
    return read(path) if path.exists() else default


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, MixDQError)


def _object(path: Path, document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    if value is not None and not isinstance(value, dict):
        raise MixDQError(f"{path}: {key} is {type(value).__name__}, expected an object")
    return value or {}


def _figures(path: Path, document: Mapping[str, Any], key: str) -> dict[str, Figures]:
    found = {}
    for name, values in _object(path, document, key).items():
        where = f"{path}: {key}, {name!r}"
        if not isinstance(values, dict):
            raise MixDQError(f"{where}: is {type(values).__name__}, expected an object of figures")
        figures = Figures(**{f.name: _number(where, f.name, values.get(f.name)) for f in fields(Figures)})
        if figures.agreement is not None and not 0 <= figures.agreement <= 1:
            raise MixDQError(f"{where}: agreement is {figures.agreement}, expected a fraction from 0 to 1")
        found[name] = figures
    return found


def _number(where: str, name: str, value: object) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not abs(value) < 1e300:  # type: ignore[operator, arg-type]
        raise MixDQError(f"{where}: {name} is {value!r:.60}, expected a finite number or null")
    return float(value)  # type: ignore[arg-type]


def _points(path: Path) -> tuple[Point, ...]:
    points = _read(path).get("points")
    if not isinstance(points, list):
        raise MixDQError(f"{path}: points is {type(points).__name__}, expected a list")
    return tuple(_point(f"{path}: point {i}", value) for i, value in enumerate(points))


def _point(where: str, value: object) -> Point:
    if not isinstance(value, dict) or not isinstance(value.get("objective"), str):
        raise MixDQError(f"{where}: expected an object with objective, weight_bits and weight_bytes")
    numbers: dict[str, Any] = {f.name: _number(where, f.name, value.get(f.name)) for f in fields(Point)[1:]}
    for name in ("weight_bits", "weight_bytes"):
        if numbers[name] is None or numbers[name] <= 0:
            raise MixDQError(f"{where}: {name} is {numbers[name]}, expected a number > 0")
    return Point(objective=value["objective"], **numbers)
