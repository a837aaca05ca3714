"""mixdq demo"""

from __future__ import annotations

import argparse

from .. import options

HELP = "the whole method on the bundled pipeline: calibrate, analyze, allocate, quantize, compile, measure, report"
EXAMPLE = "mixdq demo --out out/demo"


def arguments(parser: argparse.ArgumentParser) -> None:
    options.out(parser, "out/demo", "folder for plans, pictures, figures and report.html")
    parser.add_argument(
        "--quick", action="store_true", help="fewer prompts and variants: minutes less, figures rougher"
    )


def run(args: argparse.Namespace) -> None:
    from ..demo import run_demo  # pyright: ignore[reportMissingImports]

    run_demo(args.out, args.quick)
