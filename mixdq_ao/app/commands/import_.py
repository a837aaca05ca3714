"""mixdq import"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import options
from ..output import counted, wrote

HELP = "convert the MixDQ authors' YAML plans and sensitivities to JSON"
EXAMPLE = "mixdq import plan --weight weight_8.00.yaml --act act_7.77.yaml --out plan.json"
SENSITIVITY_FILES = ("weight-ssim", "weight-sqnr", "act-ssim", "act-sqnr", "weight-ratio", "act-ratio")
SCORES = "mixdq import sensitivity " + " ".join(f"--{n} {n.replace('-', '_')}.yaml" for n in SENSITIVITY_FILES)


def arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="plan|sensitivity", parser_class=type(parser))
    plan = options.command(kinds, "plan", "bits of every layer", EXAMPLE)
    plan.add_argument("--weight", type=Path, required=True, metavar="YAML", help="weight bits, one layer a line")
    plan.add_argument("--act", type=Path, metavar="YAML", help="activation bits (default: activations stay)")
    plan.add_argument("--protect", nargs="+", default=(), metavar="NAME", help="layers kept at 16 bits")
    options.calibration(plan, "fills in the ranges, so that the plan is ready to use")
    options.out(plan, "plan.json", "file to write")
    scores = options.command(kinds, "sensitivity", "scores of every layer", SCORES)
    for name in SENSITIVITY_FILES:
        scores.add_argument(f"--{name}", type=Path, required=True, metavar="YAML")
    options.out(scores, "sensitivity.json", "file to write")


def run(args: argparse.Namespace) -> None:
    _plan(args) if args.kind == "plan" else _sensitivity(args)


def _plan(args: argparse.Namespace) -> None:
    from ...plan import Plan
    from ...search.calibration import Calibration

    plan = Plan.from_mixdq_yaml(args.weight, args.act, args.protect)
    if args.calibration:
        plan = plan.with_calibration(Calibration.load(args.calibration))
    plan.save(args.out)
    wrote(args.out, f"bits of {counted(len(plan.layers), 'layer')}")


def _sensitivity(args: argparse.Namespace) -> None:
    from ...search.sensitivity import Sensitivity

    files = {name: getattr(args, name) for name in (n.replace("-", "_") for n in SENSITIVITY_FILES)}
    sensitivity = Sensitivity.from_mixdq_yaml(**files)
    sensitivity.save(args.out)
    wrote(args.out, f"scores of {counted(len(sensitivity.layers), 'layer')}")
