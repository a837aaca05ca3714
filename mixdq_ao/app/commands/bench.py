"""mixdq bench"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import options
from ..inputs import at_least
from ..output import counted, show_json, wrote

HELP = "run the repository's benchmarks, or those whose names match"
EXAMPLE = "mixdq bench serialization --json"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="part of a benchmark's file or test name (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the benchmarks, run none")
    parser.add_argument("--quick", action="store_true", help="only the short ones, which guard against slower ratios")
    parser.add_argument("--gpu", action="store_true", help="include benchmarks that need a GPU")
    parser.add_argument(
        "--rounds", type=at_least(1), metavar="N", help="least rounds of each (default: as they choose)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep all that was measured (pytest-benchmark's JSON)")
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    from ..benchmarks import names_of, run_benchmarks

    if args.list:
        found = names_of(args.names, gpu=args.gpu, quick=args.quick)
        show_json(found) if args.json else print("\n".join(found))
        return
    options = {name: getattr(args, name) for name in ("gpu", "quick", "rounds", "out")}
    figures = run_benchmarks(args.names, quiet=args.json, **options)
    if args.json:
        show_json(figures)
    if args.out:
        wrote(args.out, f"figures of {counted(len(figures), 'benchmark')}")
