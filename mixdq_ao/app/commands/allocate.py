"""mixdq allocate"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import options
from ..inputs import budget, integers
from ..output import mebibytes, show, show_json, wrote

if TYPE_CHECKING:
    from ...search.allocation import Allocation

HELP = "choose bits for every layer within a size budget, by integer programming"
EXAMPLE = (
    "mixdq allocate sensitivity.json --weight-bits 4 --act-bits 8 --objective additive "
    "--calibration calibration.json --out plan.json"
)
OBJECTIVES = ("additive", "decoupled", "sqnr")
FORMS = ("error", "linear", "integer")
"""Objectives of network orthogonality."""


def arguments(parser: argparse.ArgumentParser) -> None:
    bits = "average bits: a number, or content=BITS,quality=BITS"
    parser.add_argument(
        "sensitivity", type=Path, metavar="SENSITIVITY", help="from mixdq analyze (either metric) or mixdq import"
    )
    parser.add_argument("--weight-bits", type=budget, required=True, metavar="BITS", help=f"of the weights, {bits}")
    parser.add_argument("--act-bits", type=budget, metavar="BITS", help="of the activations, likewise (default: all 8)")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES + FORMS,
        help="of errors: additive: least summed error; decoupled: SSIM for content and SQNR for quality layers, as "
        "published (default); sqnr: SQNR for all. Of orthogonality: error: least sum of theta / 4^bits (default); "
        "linear: most theta x bits, as published; integer: the same over whole bits",
    )
    parser.add_argument("--weight-choices", type=integers, metavar="LIST", help="weight bits offered, such as 2,4,8")
    parser.add_argument("--act-choices", type=integers, metavar="LIST", help="activation bits offered, such as 4,8")
    parser.add_argument("--protect", nargs="+", default=(), metavar="NAME", help="layers kept at 16 bits")
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S", help="seconds to solve (default 60)")
    options.calibration(parser, "fills in the ranges, so that the plan is ready to use")
    options.out(parser, "plan.json", "file to write")
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    from ...search.calibration import Calibration

    find = _by_orthogonality if _format(args.sensitivity) == "mixdq-orthogonality" else _by_errors
    calibration = Calibration.load(args.calibration) if args.calibration else None
    result = find(args)
    plan = result.plan if calibration is None else result.plan.with_calibration(calibration)
    plan.save(args.out)
    wrote(args.out, f"bits of {len(plan.layers)} layers" + ("" if calibration else ", without ranges yet"))
    fields = ("status", "objective", "average_bits", "predicted_error", "weight_bytes", "k", "seconds")
    figures = {name: _plain(getattr(result, name)) for name in fields}
    show_json({"plan": str(args.out), **figures}) if args.json else show("allocation", _rows(figures))


def _format(path: Path) -> object:
    """What a file says it is; None where it says nothing, and reading it will say why."""
    from ...jsonfile import parse

    try:
        document = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document.get("format") if isinstance(document, dict) else None


def _by_errors(args: argparse.Namespace) -> Allocation:
    from ... import allocate
    from ...search.sensitivity import Sensitivity

    sensitivity = Sensitivity.load(args.sensitivity)
    return allocate(sensitivity, objective=_objective(args, OBJECTIVES, "decoupled"), **_shared(args))


def _by_orthogonality(args: argparse.Namespace) -> Allocation:
    """The same request of ``allocate_orthogonal``, whose default choices are the same for all layers."""
    from ... import allocate_orthogonal
    from ...search.orthogonality import Orthogonality

    shared = {name: value for name, value in _shared(args).items() if value is not None}
    measured = Orthogonality.load(args.sensitivity)
    return allocate_orthogonal(measured, form=_objective(args, FORMS, "error"), **shared)


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    names = ("weight_bits", "act_bits", "weight_choices", "act_choices", "protect", "time_limit")
    return {name: getattr(args, name) for name in names}


def _objective(args: argparse.Namespace, offered: tuple[str, ...], default: str) -> Any:
    """Raises AllocationError where the objective is one of the other kind of file."""
    from ...errors import AllocationError

    if args.objective not in (None, *offered):
        kind = "errors of layers" if offered == OBJECTIVES else "correlations between layers"
        raise AllocationError(
            f"objective is {args.objective!r}, but {args.sensitivity} holds {kind}; expected one of "
            f"{', '.join(offered)}"
        )
    return args.objective or default


def _plain(value: object) -> object:
    return dict(value) if hasattr(value, "keys") else value  # type: ignore[call-overload]


def _rows(figures: dict) -> dict[str, str]:
    bits = {f"average bits, {key}": f"{value:.2f}" for key, value in figures["average_bits"].items()}
    error = figures["predicted_error"]
    predicted = "not known" if error is None else f"{error:.3g} of the output's power"
    rows = {"status": figures["status"], **bits, "weights": mebibytes(figures["weight_bytes"])}
    return rows | {"predicted error": predicted, "solved in": f"{figures['seconds']:.1f} s"}
