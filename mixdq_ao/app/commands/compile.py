"""mixdq compile"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...errors import MixDQError
from .. import options
from ..inputs import at_least, load_pipeline, plan_of
from ..output import mebibytes, show, show_json, wrote

HELP = "compile a quantized denoiser ahead of time into one file, which runs without this library"
EXAMPLE = "mixdq compile quantized --out unet.pt2   # quantized: from mixdq quantize --out"


def arguments(parser: argparse.ArgumentParser) -> None:
    options.pipeline(parser)
    options.plan(parser, required=False)
    options.calibration(parser, "ranges for a plan without them")
    parser.add_argument("--batch-size", type=at_least(1), default=1, metavar="N", help="prompts at once (default 1)")
    options.size(parser)
    parser.add_argument(
        "--kernels",
        choices=("auto", "ours", "plain"),
        default="auto",
        help="on a CPU 'plain' torch operators (default) need no Python of ours, 'ours' are faster and need "
        "inductor_kernels; on a GPU ours are compiled in",
    )
    options.out(parser, "model.pt2", "the package")
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.out.suffix != ".pt2":
        raise MixDQError(f"{args.out}: expected a file name that ends in .pt2")
    plan = plan_of(args)
    pipe = load_pipeline(args.pipeline, **options.where(args))
    from ...models.pipelines import denoiser
    from ...models.portable import package
    from ..quantized import apply_plan

    if plan is not None:
        apply_plan(pipe, plan)
    call = _call(pipe, args)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    needs_us = package(denoiser(pipe), call, args.out, use=args.kernels)
    size = args.out.stat().st_size
    if args.json:
        show_json({"package": str(args.out), "bytes": size, "needs_inductor_kernels": needs_us, "inputs": sorted(call)})
        return
    show(
        f"{type(denoiser(pipe)).__name__} compiled",
        {
            "bytes": mebibytes(size),
            "called with": ", ".join(sorted(call)),
            "a process that runs it": "imports inductor_kernels first"
            if needs_us
            else "needs torch and nothing of ours",
        },
    )
    wrote(args.out, "for torch._inductor.aoti_load_package")


def _call(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that are not None in the pipeline's call of its denoiser at these sizes, by name."""
    from ...models.pipelines import Sampling, denoiser, generate_all
    from ...models.portable import captured_call

    size = Sampling(batch_size=args.batch_size, **options.sized(args))
    prompts = ["a picture"] * args.batch_size
    call = captured_call(denoiser(pipe), lambda: generate_all(pipe, prompts, size, "latent"))
    return {name: value for name, value in call.items() if value is not None}
