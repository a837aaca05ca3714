"""mixdq analyze"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import options
from ..inputs import integers, load_pipeline, read_prompts
from ..output import counted, wrote

HELP = "measure how much each layer suffers from each bit width; a stopped run continues from its store"
EXAMPLE = (
    "mixdq analyze examples/shapes/pipeline --prompts prompts.txt --calibration calibration.json "
    "--store results.jsonl --out sensitivity.json"
)


def arguments(parser: argparse.ArgumentParser) -> None:
    options.pipeline(parser)
    options.prompts(parser)
    options.calibration(parser, "ranges of the activations (default: calibrated on the same prompts)")
    parser.add_argument(
        "--store", type=Path, metavar="FILE", help="every result is appended here; run the same command to continue"
    )
    options.out(parser, "sensitivity.json", "file to write")
    options.sampling(parser, "1", 16)
    parser.add_argument("--weight-bits", type=integers, default=[2, 4, 8], metavar="LIST", help="default 2,4,8")
    parser.add_argument("--act-bits", type=integers, default=[4, 8], metavar="LIST", help="default 4,8")


def run(args: argparse.Namespace) -> None:
    from mixdq_ao.search.calibration import Calibration

    prompts = read_prompts(args.prompts)
    calibration = Calibration.load(args.calibration) if args.calibration else None
    pipe = load_pipeline(args.pipeline, device=args.device, dtype=args.dtype)
    from mixdq_ao import analyze

    result = analyze(
        pipe,
        prompts,
        store=args.store,
        calibration=calibration,
        steps=args.steps,
        weight_bits=args.weight_bits,
        act_bits=args.act_bits,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    result.save(args.out)
    wrote(args.out, f"scores of {len(result.layers)} layers over {counted(len(prompts), 'prompt')}")
