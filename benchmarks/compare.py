"""Ratios of two benchmark runs on one machine: python -m benchmarks.compare RECORD.json [NEW.json] [--tolerance 0.15]

With one file it shows its ratios. Reads files of ``pytest benchmarks --benchmark-json=FILE``. Compares only speed-ups
over the reference of the same run, never seconds of different runs. Exits with 1 if a ratio fell by more than the
tolerance and the confidence intervals do not overlap, with 2 if the files are not comparable: another processor, thread
count or torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

SAME = ("processor", "cpu_capability", "vnni", "amx", "threads", "gpu")


class Incomparable(Exception):
    """The files are not results, or not of the same machine."""


def read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
        document["machine_info"]["mixdq"], document["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Incomparable(f"{path}: not a result of `pytest benchmarks --benchmark-json` ({error!r})") from error
    return document


def check_same(record: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises Incomparable naming what differs."""
    a, b = record["machine_info"]["mixdq"], new["machine_info"]["mixdq"]
    differing = [f"{key} ({a.get(key)!r}, {b.get(key)!r})" for key in SAME if a.get(key) != b.get(key)]
    versions = [env.get("packages", {}).get("torch") for env in (a, b)]
    if versions[0] != versions[1]:
        differing.append(f"torch ({versions[0]}, {versions[1]})")
    if differing:
        raise Incomparable(f"not the same machine: {', '.join(differing)}; ratios of one say nothing about the other")


def ratios(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """{(benchmark, contender): {"speedup", "low", "high", "ms"}}, without the references."""
    found = {}
    for benchmark in document["benchmarks"]:
        contenders = benchmark.get("extra_info", {}).get("contenders", {})
        for name, row in list(contenders.items())[1:]:
            found[benchmark["name"], name] = row
    return found


def fell(record: dict[str, float], new: dict[str, float], tolerance: float) -> bool:
    """Whether a speed-up is lower by more than ``tolerance`` (relative) and the confidence intervals do not overlap."""
    return new["speedup"] < (1 - tolerance) * record["speedup"] and new["high"] < record["low"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--tolerance", type=float, default=0.15, help="share of a ratio that may be lost")
    options = parser.parse_args(arguments)
    try:
        record = read(options.record)
        if options.new is None:
            Console().print(_shown(ratios(record)))
            return 0
        new = read(options.new)
        check_same(record, new)
    except Incomparable as error:
        print(error, file=sys.stderr)
        return 2
    before, after = ratios(record), ratios(new)
    table, lost = Table("benchmark", "contender", "record", "now", ""), 0
    for key in sorted(before.keys() | after.keys()):
        cells = ["-" if key not in side else _cell(side[key]) for side in (before, after)]
        bad = key in before and key in after and fell(before[key], after[key], options.tolerance)
        lost += bad
        table.add_row(*map(escape, key), *cells, "slower" if bad else "")
    Console().print(table)
    if lost:
        print(f"{lost} ratios fell by more than {options.tolerance:.0%}", file=sys.stderr)
    return int(lost > 0)


def _shown(found: dict[tuple[str, str], dict[str, float]]) -> Table:
    table = Table("benchmark", "contender", "ms", "times the reference")
    for key, row in sorted(found.items()):
        table.add_row(*map(escape, key), f"{row['ms']:.2f}", _cell(row))
    return table


def _cell(row: dict[str, float]) -> str:
    return f"{row['speedup']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


if __name__ == "__main__":
    sys.exit(main())
