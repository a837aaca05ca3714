"""mixdq analyze"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import options
from ..inputs import at_least, integers, load_pipeline, read_prompts
from ..output import counted, show_json, wrote

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
        "--metric",
        choices=("error", "orthogonality"),
        default="error",
        help="error: what each bit width costs (default); orthogonality: how little outputs of layers correlate, from "
        "one run in full precision (MPQ-Diff)",
    )
    parser.add_argument(
        "--store", type=Path, metavar="FILE", help="every result is appended here; run the same command to continue"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="file to write (default sensitivity.json, or orthogonality.json)"
    )
    options.sampling(parser, "1", 16)
    parser.add_argument("--weight-bits", type=integers, default=[2, 4, 8], metavar="LIST", help="default 2,4,8")
    parser.add_argument("--act-bits", type=integers, default=[4, 8], metavar="LIST", help="default 4,8")
    only = "of the metric orthogonality"
    parser.add_argument(
        "--timesteps", type=at_least(1), metavar="N", help=f"{only}: steps sampled, uniformly (default: all of --steps)"
    )
    parser.add_argument(
        "--estimator", choices=("biased", "unbiased"), help=f"{only}: biased as published (default), or unbiased"
    )
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    from mixdq_ao.search.calibration import Calibration

    _check(args)
    prompts = read_prompts(args.prompts)
    calibration = Calibration.load(args.calibration) if args.calibration else None
    pipe = load_pipeline(args.pipeline, device=args.device, dtype=args.dtype)
    names = ("steps", "guidance_scale", "seed", "batch_size")
    common: dict[str, Any] = {"calibration": calibration, **{name: getattr(args, name) for name in names}}
    measure = _orthogonality if args.metric == "orthogonality" else _errors
    out, layers = measure(args, pipe, prompts, common)
    if args.json:
        show_json({args.metric: str(out), "layers": layers, "prompts": len(prompts)})


def _check(args: argparse.Namespace) -> None:
    """Options that the metric would not heed are refused."""
    from mixdq_ao.errors import MixDQError

    orthogonal = args.metric == "orthogonality"
    for name in ("store",) if orthogonal else ("timesteps", "estimator"):
        if getattr(args, name) is not None:
            raise MixDQError(f"--{name} has no use with --metric {args.metric}; leave it out")


def _errors(args: argparse.Namespace, pipe: Any, prompts: list[str], common: dict[str, Any]) -> tuple[Path, int]:
    """The file written and the number of layers in it."""
    from mixdq_ao import analyze

    bits = {"weight_bits": args.weight_bits, "act_bits": args.act_bits}
    result = analyze(pipe, prompts, store=args.store, **bits, **common)
    out = args.out or Path("sensitivity.json")
    result.save(out)
    wrote(out, f"scores of {len(result.layers)} layers over {counted(len(prompts), 'prompt')}")
    return out, len(result.layers)


def _orthogonality(args: argparse.Namespace, pipe: Any, prompts: list[str], common: dict[str, Any]) -> tuple[Path, int]:
    """The same for correlations."""
    from mixdq_ao import orthogonality

    result = orthogonality(pipe, prompts, timesteps=args.timesteps, estimator=args.estimator or "biased", **common)
    out = args.out or Path("orthogonality.json")
    result.save(out)
    sampled = f"{len(result.sampled)} of {counted(result.steps, 'step')}"
    wrote(out, f"correlations of {len(result.layers)} layers over {counted(len(prompts), 'prompt')} at {sampled}")
    return out, len(result.layers)
