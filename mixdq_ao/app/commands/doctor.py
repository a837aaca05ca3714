"""mixdq doctor"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import options
from ..output import show, show_json

HELP = "what this machine can run, which layers are faster here than 16 bit, and why the others are not"
EXAMPLE = "mixdq doctor --plan plan.json"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, metavar="FILE", help="say it for the layers of this plan")
    parser.add_argument("--measure", action="store_true", help="time two layers in every way (seconds)")
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    from ..inputs import load_plan
    from ..machine import advice, examine
    from ..pace import as_measured, paces, plan_paces

    plan = load_plan(args.plan, None) if args.plan else None
    facts = examine()
    found, times = paces(facts), None
    if args.measure:
        from ..speed import measure_layers, speedups

        times = measure_layers()
        found = as_measured(found, speedups(times))
    kinds = [str(pace) for pace in found] if plan is None else plan_paces(plan, found)
    lines = [*advice(facts), *kinds]
    if args.json:
        measured = {} if times is None else {"milliseconds": times}
        show_json({**facts, **measured, "layers": [pace.to_json() for pace in found], "advice": lines})
        return
    for title, part in facts.items():
        show(title, {name: _text(value) for name, value in part.items()})
        print()
    for name, of in (times or {}).items():
        show(f"{name}, ms", {kind: f"{ms:.2f}" for kind, ms in of.items()})
        print()
    for line in lines:
        print(line)


def _text(value: object) -> str:
    if value is None:
        return "not found"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
