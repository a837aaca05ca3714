"""mixdq moments"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import options
from ..inputs import load_pipeline, read_prompts
from ..output import counted, mebibytes, show_json, wrote

HELP = "collect second moments of layers' inputs, which better rounding needs"
EXAMPLE = (
    "mixdq moments examples/shapes/pipeline --prompts prompts.txt --calibration calibration.json "
    "--out moments.safetensors"
)


def arguments(parser: argparse.ArgumentParser) -> None:
    options.pipeline(parser)
    options.prompts(parser)
    what = "from mixdq calibrate: which layers there are, and where BOS rows are set apart"
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help=what)
    some = "only of these layers; a matrix takes 4 bytes times the square of a layer's inputs (default: all)"
    parser.add_argument("--layers", nargs="+", metavar="NAME", help=some)
    options.out(parser, "moments.safetensors", "file to write")
    options.sampling(parser, "1", 16, several=True)
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    from ...search.calibration import Calibration

    prompts, calibration = read_prompts(args.prompts), Calibration.load(args.calibration)
    pipe = load_pipeline(args.pipeline, **options.where(args), steps=args.steps)
    from ... import input_moments

    found = input_moments(pipe, prompts, calibration=calibration, layers=args.layers, **options.drawn(args))
    found.save(args.out)
    size = mebibytes(found.bytes)
    wrote(args.out, f"moments of {counted(len(found), 'layer')} from {counted(len(prompts), 'prompt')}, {size}")
    if args.json:
        show_json({"moments": str(args.out), "layers": len(found), "prompts": len(prompts), "bytes": found.bytes})
