"""mixdq recover"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...errors import MixDQError
from .. import options
from ..inputs import at_least, between, finite, integers, load_pipeline, load_plan, read_prompts
from ..output import show, show_json, wrote

HELP = "train a quantized denoiser back to what full precision draws, and store it"
EXAMPLE = (
    "mixdq recover examples/shapes/pipeline --plan plan.json --prompts prompts.txt --steps 1000 --trajectory 1,4 "
    "--checkpoint recovery --out unet-recovered"
)

LARGEST_SEED = 2**43 - 1
"""The order of batches is drawn from a seed about a million times as large, which torch must accept too."""


def arguments(parser: argparse.ArgumentParser) -> None:
    options.pipeline(parser)
    options.plan(parser, required=True)
    options.calibration(parser, "ranges for a plan without them, and for rounding by second moments")
    options.prompts(parser)
    held = "prompts to measure on, one a line (default: the last eighth of --prompts, which is not learned from)"
    parser.add_argument("--held-out", type=Path, metavar="FILE", help=held)
    parser.add_argument("--steps", type=at_least(1), default=1000, metavar="N", help="optimizer steps (default 1000)")
    first = "of these, steps in which every block learns by itself (default 0)"
    parser.add_argument("--block-steps", type=at_least(0), default=0, metavar="N", help=first)
    parser.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="samples a step (default 16)")
    counts = "denoising steps to learn, separated by commas where several (default 1,4)"
    parser.add_argument("--trajectory", type=integers, default=[1, 4], metavar="N", help=counts)
    parser.add_argument("--lr", type=float, metavar="X", help="learning rate, relative to the size of each parameter")
    what = "weights: everything (default); low_rank: thin matrices added to weights before rounding, less memory"
    parser.add_argument("--train", choices=("weights", "low_rank"), default="weights", help=what)
    parser.add_argument("--rank", type=at_least(1), metavar="N", help="of low_rank (default 16)")
    fixed = "keep the weights' scales as the plan makes them (default: they are trained too)"
    parser.add_argument("--fixed-scales", dest="learn_scales", action="store_false", help=fixed)
    parser.add_argument("--learn-ranges", action="store_true", help="train the ranges of layers' inputs too")
    beside = "weight of the blocks' own relative errors beside the output's (default 0)"
    parser.add_argument("--block-weight", type=float, default=0.0, metavar="X", help=beside)
    noise = "record trajectories anew after so many steps (default 0: never)"
    parser.add_argument("--refresh", type=at_least(0), default=0, metavar="N", help=noise)
    scale = "classifier-free guidance of the trajectories; 0 turns it off (default)"
    parser.add_argument("--guidance-scale", type=finite, default=0.0, metavar="X", help=scale)
    number = between(0, LARGEST_SEED)
    parser.add_argument("--seed", type=number, default=0, metavar="N", help="of noise and batches (default 0)")
    options.size(parser)
    often = "steps between measurements on held-out prompts (default 100)"
    parser.add_argument("--evaluate-every", type=at_least(1), default=100, metavar="N", help=often)
    place = (
        "directory to keep the run in; the same command goes on after it was killed (a finished run is not lengthened)"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help=place)
    options.out(parser, "recovered", "directory for the quantized denoiser")
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.rank is not None and args.train != "low_rank":
        raise MixDQError("--rank is of --train low_rank")
    options.check_apart(args, "checkpoint", "out")
    plan, prompts = load_plan(args.plan, args.calibration), read_prompts(args.prompts)
    held_out = read_prompts(args.held_out) if args.held_out else None
    from ...models.serialization import refuse_foreign

    refuse_foreign(args.out)
    if args.checkpoint is not None:
        from ...training.recover_state import check_directory

        check_directory(args.checkpoint)
    pipe = load_pipeline(args.pipeline, **options.where(args), steps=args.trajectory)
    from ... import recover, save_quantized
    from ...models.pipelines import denoiser
    from ...training.recover_loop import decibel

    plan.validate(denoiser(pipe))
    names = ("block_steps", "batch_size", "trajectory", "train", "learn_scales", "learn_ranges")
    names += ("block_weight", "refresh", "evaluate_every", "guidance_scale", "seed")
    chosen: dict[str, Any] = {name: getattr(args, name) for name in names} | options.sized(args)
    chosen |= {name: getattr(args, name) for name in ("lr", "rank") if getattr(args, name) is not None}
    chosen |= {"held_out": held_out, "checkpoint": args.checkpoint, "moments": _moments(args, pipe, plan, prompts)}
    found = recover(pipe, plan, prompts, steps=args.steps, **chosen)
    save_quantized(denoiser(pipe), args.out, plan=found.plan)
    wrote(args.out, f"the quantized denoiser, state of step {found.best_step}")
    if args.json:
        show_json(found.to_json())
        return
    rows = {"by rounding alone": decibel(found.before), "recovered": decibel(found.after)}
    rows |= {"as packed integers": decibel(found.real), "run": found.status, "seconds": f"{found.seconds:.0f}"}
    show("denoiser's output against full precision, held-out prompts", rows)


def _moments(args: argparse.Namespace, pipe: Any, plan: Any, prompts: list[str]) -> Any:
    """Second moments of the layers that the plan rounds by them; None if there are none."""
    layers = [name for name, layer in plan.layers.items() if layer.needs_moment]
    if not layers:
        return None
    from ... import Calibration, input_moments

    if args.calibration is None:
        raise MixDQError(f"layer {layers[0]!r} is rounded by second moments, which need --calibration")
    calibration = Calibration.load(args.calibration)
    few = prompts[:32]
    drawn: dict[str, Any] = {"steps": args.trajectory, "seed": args.seed, **options.sized(args)}
    return input_moments(pipe, few, calibration=calibration, layers=layers, **drawn)
