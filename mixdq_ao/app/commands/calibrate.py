"""mixdq calibrate"""

from __future__ import annotations

import argparse

from .. import options
from ..inputs import load_pipeline, read_prompts
from ..output import counted, show_json, wrote

HELP = "record the range of every layer's input, and the BOS embedding, over real prompts"
EXAMPLE = "mixdq calibrate examples/shapes/pipeline --prompts prompts.txt --steps 1,4 --out calibration.json"


def arguments(parser: argparse.ArgumentParser) -> None:
    options.pipeline(parser)
    options.prompts(parser)
    options.out(parser, "calibration.json", "file to write")
    options.sampling(parser, "1", 16, several=True)
    parser.add_argument(
        "--method",
        choices=("minmax", "percentile", "mse"),
        default="minmax",
        help="how a range follows from the values seen (default minmax)",
    )
    parser.add_argument(
        "--act-bits",
        type=int,
        choices=(8, 4),
        default=8,
        help="of the activations that mse looks for the best range of (default 8)",
    )
    parser.add_argument(
        "--smoothing",
        type=float,
        metavar="STRENGTH",
        help="0 to 1: make channels that stand out smaller by powers of two, folded into the weights (0.5 is usual)",
    )
    parser.add_argument(
        "--rotation", action="store_true", help="rotate the values of attention within heads, folded into the weights"
    )
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    prompts = read_prompts(args.prompts)
    pipe = load_pipeline(args.pipeline, **options.where(args), steps=args.steps)
    from ... import calibrate
    from ...quantize.folds import Folding

    result = calibrate(
        pipe,
        prompts,
        method=args.method,
        act_bits=args.act_bits,
        **options.drawn(args),
        smoothing=args.smoothing,
        rotation=args.rotation,
    )
    result.save(args.out)
    aware = sum(layer.prompt_range is not None for layer in result.layers.values())
    bos = f"BOS kept apart in {aware}" if result.bos_embedding else "no BOS row stands out"
    folded = sum(map(bool, map(Folding.of, result.layers.values())))
    bos += f", {folded} smoothed or rotated" if folded else ""
    wrote(args.out, f"ranges of {counted(len(result.layers), 'layer')} from {counted(len(prompts), 'prompt')}, {bos}")
    if args.json:
        figures = {
            "layers": len(result.layers),
            "layers_with_bos_apart": aware,
            "prompts": len(prompts),
            "layers_folded": folded,
        }
        show_json({"calibration": str(args.out), **figures})
