"""mixdq allocate"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...search.objectives import OBJECTIVES
from .. import options
from ..inputs import at_least, budget, integers, load_pipeline, read_prompts
from ..output import counted, mebibytes, show, show_json, show_table, wrote

if TYPE_CHECKING:
    from ...plan import Plan
    from ...search.allocation import Allocation
    from ...search.calibration import Calibration
    from ...search.choose import Judged

HELP = "choose bits for every layer within a size budget, by integer programming"
EXAMPLE = (
    "mixdq allocate sensitivity.json --weight-bits 4 --act-bits 8 --objective additive "
    "--calibration calibration.json --out plan.json"
)
FORMS = ("error", "linear", "integer")
"""Objectives of network orthogonality."""
OF_PIPELINE = ("choose", "check", "moments", "prompts", "seeds", *options.MACHINE, *options.SAMPLING)
"""Options that have an effect only with ``--pipeline``."""


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
    _measuring(parser.add_argument_group("measuring plans on the model itself"))
    parser.set_defaults(**dict.fromkeys(options.SAMPLING))


def _measuring(group: argparse._ArgumentGroup) -> None:
    several: dict[str, Any] = {"type": at_least(2), "nargs": "?", "const": 12, "metavar": "N"}
    group.add_argument(
        "--pipeline", metavar="PIPELINE", help="directory or name on the hub: measure the plan's error there too"
    )
    group.add_argument("--prompts", type=Path, metavar="FILE", help="what it draws for that; one prompt a line, UTF-8")
    group.add_argument(
        "--choose",
        **several,
        help="of at most N candidates (default 12: all objectives, unless --objective names one, and ways to divide "
        "the budget) take the one whose pictures are closest to full precision's",
    )
    group.add_argument(
        "--check",
        **several,
        help="measure N random plans as well (default 12): whether predicted errors hold on this model",
    )
    seeds = "pictures per prompt to choose by (default 1)"
    group.add_argument("--seeds", type=at_least(1), metavar="N", help=seeds)
    group.add_argument("--moments", type=Path, metavar="FILE", help="from mixdq moments, for compensated rounding")
    options.machine(group)
    options.sampling(group, "1", 16)


def run(args: argparse.Namespace) -> None:
    from ...search.calibration import Calibration

    orthogonal = _format(args.sensitivity) == "mixdq-orthogonality"
    _check(args, orthogonal)
    calibration = Calibration.load(args.calibration) if args.calibration else None
    if args.pipeline is not None:
        assert calibration is not None
        result, plan, judged = _measured(args, calibration)
    else:
        result, judged = (_by_orthogonality if orthogonal else _by_errors)(args), []
        plan = result.plan if calibration is None else result.plan.with_calibration(calibration)
    plan.save(args.out)
    wrote(args.out, f"bits of {counted(len(plan.layers), 'layer')}" + ("" if calibration else ", without ranges yet"))
    fields = ("status", "objective", "average_bits", "predicted_error", "weight_bytes", "k", "seconds")
    figures = {name: _plain(getattr(result, name)) for name in fields}
    figures |= {name: plan.metadata[name] for name in MEASURED if name in plan.metadata}
    if args.json:
        show_json({"plan": str(args.out), **figures, "candidates": [_candidate(j) for j in judged]})
        return
    if judged:
        _show_candidates(judged)
    show("allocation", _rows(figures))


MEASURED = ("measured_error", "measured_over_predicted", "prediction_agreement", "measured_psnr", "measured_pictures")


def _check(args: argparse.Namespace, orthogonal: bool) -> None:
    """Raises MixDQError for options that need other options or another kind of file."""
    from ...errors import MixDQError

    if args.pipeline is None:
        for name in OF_PIPELINE:
            if getattr(args, name) is not None:
                flag = options.flag(name)
                raise MixDQError(f"{flag} is about plans measured on a model; give --pipeline and --prompts too")
        return
    if args.seeds is not None and args.choose is None:
        raise MixDQError("--seeds is of --choose")
    for name in ("prompts", "calibration"):
        if getattr(args, name) is None:
            raise MixDQError(f"--pipeline needs --{name} to measure plans with")
    if orthogonal:
        raise MixDQError(f"{args.sensitivity} holds no errors to compare with; use --pipeline with mixdq analyze's")


def _measured(args: argparse.Namespace, calibration: Calibration) -> tuple[Allocation, Plan, list[Judged]]:
    """The plan, with ``--choose`` the best of several candidates, with its measured error in its metadata."""
    from ... import Moments
    from ...models.pipelines import Sampling
    from ...search.choose import candidates, choose
    from ...search.prediction import check_prediction
    from ...search.sensitivity import Sensitivity

    sensitivity, prompts = Sensitivity.load(args.sensitivity), read_prompts(args.prompts)
    moments = None if args.moments is None else Moments.load(args.moments)
    sampling = Sampling(**options.drawn(args))
    shared: dict[str, Any] = {"moments": moments, "sampling": sampling}
    judged: list[Judged] = []
    if args.choose is None:
        result = _by_errors(args)
        plan = result.plan.with_calibration(calibration)
    else:
        objectives = OBJECTIVES if args.objective is None else (_objective(args, OBJECTIVES, "decoupled"),)
        found = candidates(sensitivity, objectives=objectives, most=args.choose, **_shared(args))
    pipe = load_pipeline(args.pipeline, **options.where(args), steps=[sampling.steps])
    if args.choose is not None:
        judged = choose(pipe, found, prompts, calibration=calibration, seeds=args.seeds or 1, **shared)
        result, plan = judged[0].allocation, judged[0].plan

    def ranges(unranged: Plan) -> Plan:
        return unranged.with_calibration(calibration)

    plan = check_prediction(pipe, sensitivity, plan, prompts, ranges=ranges, count=args.check or 0, **shared)
    return result, plan, judged


def _candidate(judged: Judged) -> dict[str, Any]:
    names = ("objective", "psnr", "ssim", "pictures")
    own = {name: _plain(getattr(judged.allocation, name)) for name in ("k", "weight_bytes", "predicted_error")}
    error = None if judged.pictures == 1 else judged.error
    return {**{name: getattr(judged, name) for name in names}, "standard_error": error, **own}


def _show_candidates(judged: list[Judged]) -> None:
    head = ("objective", "k", "weights", "predicted error", "PSNR, dB", "SSIM")
    rows = [
        (
            j.objective,
            ", ".join(f"{k:.2f}" for k in j.allocation.k.values()) or "-",
            mebibytes(j.allocation.weight_bytes),
            "-" if j.allocation.predicted_error is None else f"{j.allocation.predicted_error:.3g}",
            f"{j.psnr:.2f}" + ("" if j.pictures == 1 else f" ± {j.error:.2f}"),
            "-" if j.ssim is None else f"{j.ssim:.4f}",
        )
        for j in judged
    ]
    show_table(f"candidates, by {counted(judged[0].pictures, 'picture')}", head, rows)


def _format(path: Path) -> object:
    """The "format" field of a file; None if it cannot be read, for which reading it later raises the error."""
    from ...errors import MixDQError
    from ...jsonfile import read_object

    try:
        return read_object(path, MixDQError).get("format")
    except MixDQError:
        return None


def _by_errors(args: argparse.Namespace) -> Allocation:
    from ... import allocate
    from ...search.sensitivity import Sensitivity

    sensitivity = Sensitivity.load(args.sensitivity)
    return allocate(sensitivity, objective=_objective(args, OBJECTIVES, "decoupled"), **_shared(args))


def _by_orthogonality(args: argparse.Namespace) -> Allocation:
    """As ``_by_errors`` with ``allocate_orthogonal``, whose default choices are the same for all layers."""
    from ... import allocate_orthogonal
    from ...search.orthogonality import Orthogonality

    shared = {name: value for name, value in _shared(args).items() if value is not None}
    measured = Orthogonality.load(args.sensitivity)
    return allocate_orthogonal(measured, form=_objective(args, FORMS, "error"), **shared)


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    names = ("weight_bits", "act_bits", "weight_choices", "act_choices", "protect", "time_limit")
    return {name: getattr(args, name) for name in names}


def _objective(args: argparse.Namespace, offered: tuple[str, ...], default: str) -> Any:
    """``--objective`` or its default. Raises AllocationError if it belongs to the other kind of file."""
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
    rows["predicted error"] = predicted
    if "measured_error" in figures:
        ratio = figures.get("measured_over_predicted")
        rows["measured error"] = f"{figures['measured_error']:.3g}" + (f", {ratio:.2f} of it" if ratio else "")
    if agreement := figures.get("prediction_agreement"):
        spread = agreement["spread"]
        rows[f"{agreement['plans']} random plans"] = f"rank correlation {agreement['rank']:.3f}" + (
            "" if spread is None else f", measured / predicted {agreement['ratio']:.2f}, spread {100 * spread:.0f} %"
        )
    return rows | {"solved in": f"{figures['seconds']:.1f} s"}
