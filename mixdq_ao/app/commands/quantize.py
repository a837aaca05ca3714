"""mixdq quantize"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import PlanError
from .. import options
from ..inputs import load_pipeline, load_plan
from ..output import mebibytes, show, show_json, wrote

if TYPE_CHECKING:
    from torch import nn

    from ...plan import Plan

HELP = "check a plan on a pipeline, quantize, say what it saves, and store the quantized pipeline"
EXAMPLE = "mixdq quantize examples/shapes/pipeline --plan plan.json --out quantized"


def arguments(parser: argparse.ArgumentParser) -> None:
    options.pipeline(parser)
    options.plan(parser, required=True)
    options.calibration(parser, "ranges for a plan without them")
    parser.add_argument(
        "--moments", type=Path, metavar="FILE", help="from mixdq moments, for a plan with compensated rounding"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="store the quantized pipeline here, for from_pretrained"
    )
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    plan = load_plan(args.plan, args.calibration)
    from ...models.pipelines import denoiser, other_denoisers
    from ...models.serialization import refuse_occupied, save_pipeline
    from ..measure import held_bytes

    if not any(layer.quantized for layer in plan.layers.values()):
        raise PlanError(f"{args.plan}: quantizes no layer, expected one of less than 16 bits")
    if args.out:
        refuse_occupied(args.out)
    pipe = _quantized(args, plan)
    model = denoiser(pipe)
    summary, before, left = plan.summary(model), _bytes_before(model), other_denoisers(pipe)
    after = held_bytes(model)
    if args.out:
        save_pipeline(pipe, args.out, plan=plan)
    if args.json:
        show_json(
            {
                "model": type(model).__name__,
                "average_weight_bits": summary.average_weight_bits,
                "average_act_bits": summary.average_act_bits,
                "layers_by_weight_bits": {str(b): n for b, n in sorted(summary.counts.items())},
                "layers_by_act_bits": {str(b): n for b, n in sorted(summary.act_counts.items())},
                "bytes_before": before,
                "bytes_after": after,
                "left_as_they_are": list(left),
                "saved": str(args.out) if args.out else None,
            }
        )
        return
    counts = ", ".join(f"{n} at {b}" for b, n in sorted(summary.counts.items()))
    show(
        f"{type(model).__name__} quantized",
        {
            "weight bits": f"{summary.average_weight_bits:.2f} on average ({counts})",
            "activation bits": f"{summary.average_act_bits:.2f} on average",
            "bytes before": f"{mebibytes(before)} ({next(model.parameters()).dtype})".replace("torch.", ""),
            "bytes after": f"{mebibytes(after)} ({after / before:.1%})",
        }
        | ({"left as it is": ", ".join(left)} if left else {}),
    )
    if args.out:
        wrote(args.out, "the quantized pipeline")


def _quantized(args: argparse.Namespace, plan: Plan) -> Any:
    """The pipeline with its denoiser quantized: weight by weight as it is read, or, for a plan that changes several
    layers at once (smoothing, rotation), after all of it is loaded."""
    from ...models import MixDQConfig
    from ...models.pipelines import denoiser
    from ..quantized import apply_plan, check_text_encoders, refuse_quantized

    where = options.where(args)
    if not any(layer.folds_input for layer in plan.layers.values()):
        pipe = load_pipeline(args.pipeline, quantizing=MixDQConfig(plan, moments=args.moments), **where)
        refuse_quantized(denoiser(pipe))
        check_text_encoders(pipe, plan)
        return pipe
    pipe = load_pipeline(args.pipeline, **where)
    plan.validate(denoiser(pipe))
    apply_plan(pipe, plan, args.moments)
    return pipe


def _bytes_before(model: nn.Module) -> int:
    """Bytes of the parameters of linear and convolution layers before they are quantized."""
    from ...layers import find_layers

    parameters = (p for module in find_layers(model).values() for p in module.parameters(recurse=False))
    return sum(p.numel() * p.dtype.itemsize for p in parameters)
