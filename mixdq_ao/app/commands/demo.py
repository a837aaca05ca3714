"""mixdq demo"""

from __future__ import annotations

import argparse

from .. import options
from ..output import show_json

HELP = "the whole method on the bundled pipeline: calibrate, analyze, allocate, quantize, compile, measure, report"
EXAMPLE = "mixdq demo --out out/demo"


def arguments(parser: argparse.ArgumentParser) -> None:
    options.out(parser, "out/demo", "folder for plans, pictures, figures and report.html")
    parser.add_argument(
        "--quick", action="store_true", help="fewer prompts and variants: minutes less, figures rougher"
    )
    parser.add_argument(
        "--full", action="store_true", help="time every variant compiled, a minute or two each, not as many as fit"
    )
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    from ..demo import run_demo

    run_demo(args.out, args.quick, args.full)
    if args.json:
        import json

        show_json(json.loads((args.out / "results.json").read_text(encoding="utf-8")))
