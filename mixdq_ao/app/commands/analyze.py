"""mixdq analyze"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import options
from ..inputs import at_least, integers, load_pipeline, part, read_prompts
from ..output import counted, show_json, wrote

METHODS = ("one_at_a_time", "probe")
OWN = {
    "error": ("store", "method", "probes", "part", "merge", "roundings", "moments"),
    "orthogonality": ("timesteps", "estimator"),
}
"""Options that apply to one metric only."""
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
    only = "of the metric error"
    parser.add_argument(
        "--method",
        choices=METHODS,
        help=f"{only}: one_at_a_time (default), or probe: estimated from a few backward passes, tens of times faster; "
        "content layers are then judged by the PSNR of the pictures",
    )
    parser.add_argument(
        "--probes", type=at_least(1), metavar="N", help="of the method probe: so many (default: until settled)"
    )
    parser.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help=f"{only}: work on part I of N, such as 2/8, into --store, for machines that share nothing; give the "
        "same --calibration to all",
    )
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=f"{only}: take over the results in these stores of other parts, and work on what is missing",
    )
    parser.add_argument(
        "--roundings",
        nargs="+",
        metavar="NAME",
        help=f"{only}: ways to round a weight, of which each layer and bit width gets the best: 'minmax nearest' "
        "(default), 'mse nearest', 'output nearest', 'output compensated', ...; those of the output need --moments",
    )
    parser.add_argument("--moments", type=Path, metavar="FILE", help="from mixdq moments")
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
    from ...search.calibration import Calibration

    _check(args)
    args.out = args.out or Path("orthogonality.json" if args.metric == "orthogonality" else "sensitivity.json")
    if args.part is None:
        options.check_files(args, "out")
        options.check_apart(args, "store", "out")
    prompts = read_prompts(args.prompts)
    calibration = Calibration.load(args.calibration) if args.calibration else None
    pipe = load_pipeline(args.pipeline, **options.where(args), steps=[args.steps])
    common: dict[str, Any] = {"calibration": calibration, **options.drawn(args)}
    if args.part is not None:
        _part(args, pipe, prompts, common)
        return
    measure = _orthogonality if args.metric == "orthogonality" else _errors
    layers = measure(args, pipe, prompts, common)
    if args.json:
        show_json({args.metric: str(args.out), "layers": layers, "prompts": len(prompts)})


def _check(args: argparse.Namespace) -> None:
    """Raises MixDQError for options that do not apply to the metric."""
    from ...errors import MixDQError

    for name in OWN["error" if args.metric == "orthogonality" else "orthogonality"]:
        if getattr(args, name) is not None:
            raise MixDQError(f"--{name} has no use with --metric {args.metric}; leave it out")
    for name, needed in (("store", "a --store of its own"), ("calibration", "the same --calibration for all parts")):
        if args.part is not None and getattr(args, name) is None:
            raise MixDQError(f"--part needs {needed}; give --{name} too")
    if args.probes is not None and args.method != "probe":
        raise MixDQError("--probes is of --method probe")
    if args.moments is not None and args.roundings is None:
        raise MixDQError("--moments is for --roundings, of which none is given")


def _errors(args: argparse.Namespace, pipe: Any, prompts: list[str], common: dict[str, Any]) -> int:
    """Writes the sensitivity file. Returns its number of layers."""
    from ... import analyze

    result = analyze(pipe, prompts, store=args.store, merge=args.merge or (), **_how(args), **common)
    result.save(args.out)
    wrote(args.out, f"scores of {counted(len(result.layers), 'layer')} over {counted(len(prompts), 'prompt')}")
    return len(result.layers)


def _part(args: argparse.Namespace, pipe: Any, prompts: list[str], common: dict[str, Any]) -> None:
    from ...search.analyze import analyze_part
    from ...search.part import Part

    options = {"merge": args.merge or (), **_how(args), **common}
    have, need = analyze_part(pipe, prompts, Part.parse(args.part), store=args.store, **options)
    wrote(args.store, f"{have} of {need} results; the whole: mixdq analyze ... --merge, with the stores of all parts")
    if args.json:
        show_json({"store": str(args.store), "results": have, "results_of_all_parts": need})


def _how(args: argparse.Namespace) -> dict[str, Any]:
    from ... import Moments

    how = {name: getattr(args, name) for name in ("weight_bits", "act_bits", "probes")}
    how |= {} if args.roundings is None else {"roundings": args.roundings}
    how |= {} if args.moments is None else {"moments": Moments.load(args.moments)}
    return {**how, "method": args.method or "one_at_a_time"}


def _orthogonality(args: argparse.Namespace, pipe: Any, prompts: list[str], common: dict[str, Any]) -> int:
    """Writes the file of correlations. Returns its number of layers."""
    from ... import orthogonality

    result = orthogonality(pipe, prompts, timesteps=args.timesteps, estimator=args.estimator or "biased", **common)
    result.save(args.out)
    sampled = f"{len(result.sampled)} of {counted(result.steps, 'step')}"
    layers = counted(len(result.layers), "layer")
    wrote(args.out, f"correlations of {layers} over {counted(len(prompts), 'prompt')} at {sampled}")
    return len(result.layers)
