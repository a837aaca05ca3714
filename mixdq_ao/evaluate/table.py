"""A table of runs: figures with their intervals, and differences from the first run with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import MixDQError
from .bootstrap import Interval, interval
from .metric import Figure
from .results import Results
from .settings import SHARED


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure minus that of the first run. ``interval`` is that of the paired difference; None if the runs do not have
    the same prompts and noise, or too few pictures."""

    value: float
    interval: Interval | None

    @property
    def sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high


def differences(first: Results, other: Results) -> dict[str, Difference]:
    """{metric: difference} for the metrics that both runs have. Raises MixDQError if a metric was computed differently,
    or against other real pictures or another reference."""
    found = {}
    for name in (n for n in other.figures if n in first.figures):
        _same_identity(name, first, other)
        a, b = first.figures[name], other.figures[name]
        _same_against(name, a, b)
        found[name] = Difference(b.value - a.value, _paired(first, other, a, b))
    return found


def _paired(first: Results, other: Results, a: Figure, b: Figure) -> Interval | None:
    same = all(getattr(first.settings, n) == getattr(other.settings, n) for n in (*SHARED, "count"))
    if not same or a.linear is None or b.linear is None:
        return None
    return interval(b.value - a.value, b.linear - a.linear)


def _same_identity(name: str, first: Results, other: Results) -> None:
    a, b = (r.metadata.get("identities", {}).get(name) for r in (first, other))
    if a != b:
        raise MixDQError(f"{name} is by {a} in one run and by {b} in another; measure both in the same way")


def _same_against(name: str, first: Figure, other: Figure) -> None:
    """Raises MixDQError if the two are against different things. A kind that only one of them names is not compared:
    ``Metric.compute`` and ``Run`` name the reference in different ways."""
    for kind in first.against.keys() & other.against.keys():
        a, b = first.against[kind], other.against[kind]
        if a != b:
            raise MixDQError(
                f"{name} is against {kind} {a} in one run and {b} in another, expected the same; measure both "
                "against one"
            )


def rows_of(runs: Mapping[str, Results]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, one row per run in the given order: figures, then differences from the first run."""
    if not runs:
        raise MixDQError("there is no run to show; give the directory of one")
    names = list(dict.fromkeys(name for run in runs.values() for name in run.figures))
    units = {name: unit for run in runs.values() for name, unit in run.units.items()}
    label, first = next(iter(runs.items()))
    header = ["run", "pictures", *(_title(name, *units[name]) for name in names)]
    if len(runs) > 1:
        header += [f"{name} - {label}" for name in names if name in first.figures]
    rows = []
    for run in runs:
        cells = [figure_text(runs[run].figures.get(name)) for name in names]
        gaps = differences(first, runs[run]) if run != label else {}
        apart = [difference_text(gaps.get(name)) for name in names if name in first.figures] if len(runs) > 1 else []
        rows.append([run, str(runs[run].settings.count), *cells, *apart])
    return header, rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def figure_text(figure: Figure | None) -> str:
    """ "17.15 [16.9, 17.4]"."""
    if figure is None:
        return ""
    return _number(figure.value) + ("" if figure.interval is None else f" {_bounds(figure.interval)}")


def difference_text(difference: Difference | None) -> str:
    """ "+0.53 [+0.1, +0.9] *"; the star says that the interval excludes 0."""
    if difference is None:
        return ""
    bounds = "" if difference.interval is None else f" {_bounds(difference.interval, '+')}"
    return f"{_number(difference.value, '+')}{bounds}{' *' if difference.sure else ''}"


def _title(name: str, better: str, unit: str) -> str:
    return f"{name}{f', {unit}' if unit else ''} {'↑' if better == 'higher' else '↓'}"


def _bounds(bounds: Interval, sign: str = "") -> str:
    return f"[{_number(bounds.low, sign)}, {_number(bounds.high, sign)}]"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4g}" if abs(value) < 1 else f"{value:{sign}.2f}"
