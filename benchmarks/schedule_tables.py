"""What ``benchmarks.schedule`` measured, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FORMS = ("uniform", "first", "last", "spread", "greedy")
GOAL = 0.8
"""Found over uniform, at the same cost."""


def tables(metadata: Mapping[str, Any], metrics: Mapping[Any, str]) -> str:
    """All tables. ``metrics``: {name: words}."""
    lines = [f"`{metadata['command']}`, {metadata['environment']['processor']}, one thread.", ""]
    lines += _additivity(metadata, metrics)
    if rows := metadata["at_cost"]:
        lines += _at_cost(rows) + _words(metadata)
        lines += _exhaustive(metadata["exhaustive"]) + _samplers(metadata) + _storage(metadata) + _seconds(metadata)
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(head), "|---" * len(head) + "|", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _additivity(metadata: Mapping[str, Any], metrics: Mapping[Any, str]) -> list[str]:
    rows = [
        (names, metrics[metric], f"{v['r_squared']:.3f}", f"{v['measured_over_predicted']:.2f}")
        for names, found in metadata["additivity"].items()
        for metric, v in found.items()
    ]
    apart = [
        f"{metrics[m]}: "
        + ", ".join(f"{v['r_squared']:.3f} among the {v['schedules']} with {kind}" for kind, v in found.items())
        for m, found in metadata["additivity_by_last_step"].items()
    ]
    words = f"Most of an error is the last step's, so also apart. {'; '.join(apart)}."
    head = ("levels", "metric", "R² of logs", "measured / predicted")
    return [*_table(head, rows), "", words.replace("with others", "others")]


def _at_cost(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The least error of each form within the cost, and of the uniform levels that exist there."""
    forms = [f for f in FORMS if any(f in row for row in rows)]
    head = ("cost at most", "found", "evaluations", *forms, "found / best by hand", "found / uniform", "levels found")
    body = []
    for row in rows:
        found = row["found"]
        cells = [_form(row[f]) if f in row else "" for f in forms]
        ratios = [f"{row[f'found_over_{other}']:.2f}" for other in ("best_by_hand", "uniform")]
        counted = f"{found['evaluations']} of {found['limit']}"
        body.append(
            (f"{row['max_cost']:.4g}", f"{found['error']:.2e}", counted, *cells, *ratios, shortened(found["levels"]))
        )
    return ["", *_table(head, body)]


def _form(figures: Mapping[str, Any]) -> str:
    """An error, with the level of a uniform schedule or the evaluations of a greedy search."""
    name = str(figures.get("name", ""))
    note = name.removeprefix("uniform ") if name.startswith("uniform ") else figures.get("evaluations", "")
    return f"{figures['error']:.2e}" + (f" ({note})" if note else "")


def shortened(levels: str) -> str:
    """ "W4A8 W4A8 16" as "2 x W4A8, 16"."""
    runs: list[list[Any]] = []
    for name in levels.split(" "):
        if runs and runs[-1][1] == name:
            runs[-1][0] += 1
        else:
            runs.append([1, name])
    return ", ".join(name if count == 1 else f"{count} x {name}" for count, name in runs)


def _words(metadata: Mapping[str, Any]) -> list[str]:
    """Where uniform precision is beaten by the goal of 20 %, where not, and what the last step has to do with it."""
    met = [f"{r['max_cost']:.4g}" for r in metadata["at_cost"] if r["found_over_uniform"] <= GOAL]
    missed = [f"{r['max_cost']:.4g}" for r in metadata["at_cost"] if r["found_over_uniform"] > GOAL]
    words = f"At least 20 % less error than the best uniform level within the cost: {', '.join(met) or 'nowhere'}"
    words += f"; less than that: {', '.join(missed)}." if missed else "."
    for cost in missed:
        least = [f"{n} {e:.2e}" for n, e in metadata["best_by_last_step"][cost].items()]
        words += f" Least error measured within {cost} by the level of the last step: {', '.join(least)}."
    shares = [f"{n} {e[-1] / sum(e):.0%}" for n, e in metadata["single_step_errors"].items()]
    words += f" The last step's part of the sum of single-step errors: {', '.join(shares)}."
    return ["", words]


def _exhaustive(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ("steps, levels", "cost at most", "found", "optimum", "optimum / found", "evaluations", "greedy")
    body = [
        (
            f"{row['steps']}, {row['levels']}",
            f"{row['max_cost']}",
            f"{row['found']:.2e}",
            f"{row['optimum']:.2e}",
            f"{row['optimum_over_found']:.3f}",
            f"{row['evaluations']} of {row['exhaustive_evaluations']}",
            f"{row['greedy']:.2e} ({row['greedy_evaluations']})",
        )
        for row in rows
    ]
    return ["", *_table(head, body)] if body else []


def _samplers(metadata: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            r["sampler"],
            f"{r['cost']:.3g}",
            f"{r['found']:.2e}",
            _form(r["uniform"]),
            f"{r['best by hand']['error']:.2e} ({r['best by hand']['name']})",
            f"{r['found'] / r['uniform']['error']:.2f}",
            f"{r['found'] / r['best by hand']['error']:.2f}",
        )
        for r in metadata["samplers"]
    ]
    head = ("sampler", "cost", "found with DDIM", "uniform", "best by hand", "found / uniform", "found / best by hand")
    intro = (
        f"The schedules above with other samplers ({metadata['samplers_prompts']} prompts), none of them searched "
        "again; by hand: the best of each form with DDIM."
    )
    return ["", intro, "", *_table(head, rows)] if rows else []


def _storage(metadata: Mapping[str, Any]) -> list[str]:
    """Errors with either way to hold several widths, and what the layers hold."""
    rows = [(n, f"{v['own']:.2e}", f"{v['nested']:.2e}") for n, v in metadata["storage"].items()]
    held = metadata["bytes"]
    rows.append(("bytes of all levels", str(held["own"]), str(held["nested"])))
    eight = next((f" (8 bits alone: {size})" for n, size in held.items() if n.startswith("W8")), "")
    return ["", *_table(("1 - SSIM", "codes of their own", f"nested in 8 bits{eight}"), rows)]


def _seconds(metadata: Mapping[str, Any]) -> list[str]:
    """Speed as measured."""
    seconds = metadata["seconds_uncompiled"]
    if not seconds:
        return []
    rows = [(n, f"{v['seconds']:.2f}", f"{v['original'] / v['seconds']:.2f}") for n, v in seconds.items()]
    words = (
        f"{metadata['prompts']} pictures, uncompiled, on the CPU, in turn in one process. The paper reports 2.5 times "
        "at 90 % SSIM for FLUX.1-dev on a GPU; that is to be checked on a GPU."
    )
    return ["", words, "", *_table(("schedule", "seconds", "times the original's speed"), rows)]
