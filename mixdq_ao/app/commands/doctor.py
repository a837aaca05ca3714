"""mixdq doctor"""

from __future__ import annotations

import argparse

from .. import options
from ..output import show, show_json

HELP = "what this machine can run, and whether int8 is faster here"
EXAMPLE = "mixdq doctor --json"


def arguments(parser: argparse.ArgumentParser) -> None:
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    from ..machine import advice, examine

    facts = examine()
    lines = advice(facts)
    if args.json:
        show_json({**facts, "advice": lines})
        return
    for title, part in facts.items():
        show(title, {name: _text(value) for name, value in part.items()})
        print()
    for line in lines:
        print(line)


def _text(value: object) -> str:
    if value is None:
        return "not found"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
