"""One step: ``python -m benchmarks.gpu STEP --out FOLDER [--dry-run]``."""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from . import kernels, results, tiles, unet

STEPS = "kernels, tiles-<pixels>[:first shape], unet-<pixels>-<batch>[:variant,...] or report"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("step", help=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    if arguments.step == "report":
        print(results.report(arguments.out))
        return
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device: use --dry-run to walk the code on the CPU")
    torch.manual_seed(0)
    with torch.no_grad():
        if arguments.step == "kernels":
            rows = kernels.sweep(dry=arguments.dry_run)
        else:
            rows = _sized(parser, arguments)
        step = arguments.step.replace(":", "-").replace(",", "-")
        whole = results.write(arguments.out, step, rows, dry=arguments.dry_run)
    if not whole and not arguments.dry_run:
        sys.exit("some rows failed")


def _sized(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Iterator[dict]:
    """The rows of a step that names its pixels."""
    step, _, chosen = arguments.step.partition(":")
    found = re.fullmatch(r"(tiles|unet)-(\d+)(?:-(\d+))?", step)
    wrong = found is None or (found[1] == "unet") != bool(found[3])
    if found is None or wrong or (found[1] == "tiles" and chosen and not chosen.isdecimal()):
        parser.error(f"step {arguments.step!r}: expected {STEPS}")
    if found[1] == "tiles":
        return tiles.sweep(int(found[2]), arguments.out, first=int(chosen or 0), dry=arguments.dry_run)
    only = tuple(filter(None, chosen.split(",")))
    try:
        return unet.compare(int(found[2]), int(found[3]), dry=arguments.dry_run, only=only)
    except ValueError as error:
        parser.error(f"step {arguments.step!r}: {error}")


if __name__ == "__main__":
    main()
