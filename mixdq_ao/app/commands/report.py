"""mixdq report"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..output import wrote

HELP = "write report.html from a folder of results"
EXAMPLE = "mixdq report out/demo"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="folder with results.json, and sensitivity.json, plan_*.json, pareto.json, schedule*.json, "
        "orthogonality.json, grid.png where there are such",
    )


def run(args: argparse.Namespace) -> None:
    from ..report import build

    wrote(build(args.directory), "open it in a browser")
