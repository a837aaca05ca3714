"""mixdq schedule"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import options
from ..inputs import at_least, load_pipeline, load_plan, read_prompts
from ..output import counted, mebibytes, show, show_json, show_table, wrote

if TYPE_CHECKING:
    from ...temporal.plan import TemporalPlan

HELP = "find a precision for every denoising step, show it, or export and import a diffusion_step_policy"
EXAMPLE = (
    "mixdq schedule search examples/shapes/pipeline --prompts prompts.txt --calibration calibration.json --steps 8 "
    "--level 16 none 1 --level W8A8 plan_w8a8.json 0.5 --level W4A8 plan_w4a8.json 0.25 --max-cost 0.4"
)
SHOWN = ("metric", "error", "evaluations", "evaluation_limit", "r_squared", "measured_over_predicted")
SHOW = "mixdq schedule show schedule.json"
EXPORT = "mixdq schedule export schedule.json --config quantized/unet/config.json --scope unet --out config.json"
IMPORT = "mixdq schedule import policy.json --plan plan.json --steps 8 --out schedule.json"
METRICS = {"ssim": "1 - SSIM of pictures", "mse": "mean squared error of latents"}


def arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="search|show|export|import", parser_class=type(parser)
    )
    search = options.command(kinds, "search", "find a schedule by measuring pictures", EXAMPLE)
    options.pipeline(search)
    options.prompts(search)
    options.calibration(search, "ranges for plans without them")
    search.add_argument(
        "--level",
        action="append",
        nargs=3,
        required=True,
        metavar=("NAME", "PLAN", "COST"),
        help="a level: its name, plan file ('none' for 16 bit: 8-bit weights and 16-bit activations, unless "
        "--keep-full) and relative cost of a step; precise first, repeat",
    )
    goal = search.add_mutually_exclusive_group(required=True)
    goal.add_argument("--max-cost", type=float, metavar="X", help="least error within this mean cost of a step")
    goal.add_argument("--max-error", type=float, metavar="X", help="least cost within this error")
    search.add_argument(
        "--metric", choices=tuple(METRICS), default="ssim", help="1 - SSIM of pictures (default), or MSE of latents"
    )
    options.storage(search)
    search.add_argument(
        "--store", type=Path, metavar="FILE", help="every result is appended here; run again to continue"
    )
    search.add_argument(
        "--check", type=at_least(0), default=0, metavar="N", help="also measure N random schedules: do errors add up?"
    )
    search.add_argument(
        "--results", type=Path, metavar="FILE", help="also write all that was measured, as schedule_*.json for a report"
    )
    options.sampling(search, "8", 16)
    options.out(search, "schedule.json", "file to write")
    options.as_json(search)
    policy = "write a diffusion_step_policy, which knows two levels: one of 16 bit, at the first and last steps"
    for name, text, example in (("show", "print a schedule", SHOW), ("export", policy, EXPORT)):
        sub = options.command(kinds, name, text, example)
        sub.add_argument("schedule", type=Path, metavar="SCHEDULE", help="from mixdq schedule search")
        if name == "show":
            options.as_json(sub)
        else:
            sub.add_argument("--config", type=Path, metavar="FILE", help="a denoiser's config.json to put it into")
            sub.add_argument("--scope", nargs="+", default=["transformer"], metavar="NAME", help="default transformer")
            options.out(sub, "policy.json", "file to write")
    sub = options.command(kinds, "import", "make a schedule of a diffusion_step_policy", IMPORT)
    sub.add_argument("policy", type=Path, metavar="POLICY", help="the policy, or a denoiser's config.json that has one")
    options.plan(sub, required=True)
    options.calibration(sub, "ranges for a plan without them")
    sub.add_argument("--steps", type=at_least(1), required=True, metavar="N", help="denoising steps of a run")
    options.out(sub, "schedule.json", "file to write")
    options.as_json(sub)


def run(args: argparse.Namespace) -> None:
    {"search": _search, "show": _show, "export": _export, "import": _import}[args.kind](args)


def _search(args: argparse.Namespace) -> None:
    from ...temporal.additivity import check_additivity, check_count
    from ...temporal.schedule import check_goal

    options.check_files(args, "results", "out")
    options.check_apart(args, "store", "results", "out")
    levels, costs = _levels(args)
    prompts = read_prompts(args.prompts)
    check_goal(args.steps, costs, args.max_cost, args.max_error)
    if args.check:
        check_count(args.check, args.steps, len(costs))
    pipe = load_pipeline(args.pipeline, **options.where(args), steps=[args.steps])
    from ...models.pipelines import Sampling, denoiser
    from ...search.fingerprint import fingerprint
    from ...temporal.collect import results_of
    from ...temporal.measure import GenerationError, draw_reference
    from ...temporal.plan import TemporalPlan
    from ...temporal.runtime import prepare
    from ...temporal.schedule import evaluation_limit, search_schedule

    plan = TemporalPlan(levels, (next(iter(levels)),) * args.steps, costs)
    sampling = Sampling(**options.drawn(args))
    settings = {"plan": replace(plan, costs=None).to_json(), "prompts": prompts, "sampling": repr(sampling)}
    settings |= {name: getattr(args, name) for name in ("metric", "storage", "keep_full")}
    subject = fingerprint(pipe, settings)
    reference = draw_reference(pipe, prompts, sampling, metric=args.metric)
    runtime = prepare(denoiser(pipe), plan, storage=args.storage, keep_full=args.keep_full)
    error = GenerationError(pipe, runtime, prompts, sampling, reference, metric=args.metric)
    limits = {"max_cost": args.max_cost, "max_error": args.max_error}
    shared: dict[str, Any] = {"steps": args.steps, "levels": costs, "store": args.store, "subject": subject}
    found = search_schedule(error, **shared, **limits)
    added = check_additivity(error, **shared, schedules=args.check) if args.check else None
    figures = {
        "metric": args.metric,
        "error": found.error,
        "evaluations": found.evaluations,
        "evaluation_limit": evaluation_limit(args.steps, len(costs)),
        "bytes": runtime.bytes(),
        "storage": args.storage,
    }
    if added is not None:
        defined = None if math.isnan(added.r_squared) else added.r_squared
        figures |= {"r_squared": defined, "measured_over_predicted": added.ratio}
    result = TemporalPlan(levels, found.levels, costs, figures)
    result.save(args.out)
    wrote(args.out, f"levels of {counted(args.steps, 'step')}, {counted(found.evaluations, 'schedule')} measured")
    if args.results is not None:
        collected = results_of([found], costs, METRICS[args.metric], added=added, metadata=limits)
        collected.save(args.results)
        wrote(args.results, f"{counted(len(collected.measured), 'schedule')} for mixdq report")
    _print(result, args.json)


def _levels(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    from ...errors import ScheduleError

    plans: dict[str, Any] = {}
    costs: dict[str, float] = {}
    for name, path, cost in args.level:
        if name in plans:
            raise ScheduleError(f"--level {name} is given twice")
        try:
            costs[name] = float(cost)
        except ValueError:
            raise ScheduleError(f"--level {name}: cost is {cost!r}, expected a number") from None
        plans[name] = None if path == "none" else load_plan(Path(path), args.calibration)
    return plans, costs


def _show(args: argparse.Namespace) -> None:
    from ...temporal.plan import TemporalPlan

    _print(TemporalPlan.load(args.schedule), args.json)


def _print(plan: TemporalPlan, as_json: bool) -> None:
    figures = {"steps": list(plan.steps), "counts": plan.counts, "cost": plan.cost, **plan.metadata}
    if as_json:
        show_json(figures)
        return
    from ...temporal.step_levels import spans

    places = {name: [i for i, level in enumerate(plan.steps) if level == name] for name in plan.levels}
    rows = [
        (name, "-" if plan.costs is None else f"{plan.costs[name]:g}", str(len(steps)), spans(steps) or "-")
        for name, steps in places.items()
    ]
    show_table("schedule", ("level", "cost", "steps", "which"), rows)
    known = {} if plan.cost is None else {"mean cost of a step": plan.cost}
    known |= {k.replace("_", " "): plan.metadata[k] for k in SHOWN if k in plan.metadata}
    size = plan.metadata.get("bytes")
    rows = {k: _said(v) for k, v in known.items()}
    show("figures", rows | ({"layers hold": mebibytes(size)} if isinstance(size, int) else {}))


def _said(value: object) -> str:
    return "undefined" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _export(args: argparse.Namespace) -> None:
    import json

    from ...jsonfile import write_document
    from ...temporal.plan import TemporalPlan
    from ...temporal.policy import export_policy, read_config

    policy = export_policy(TemporalPlan.load(args.schedule), scope=tuple(args.scope))
    document = policy.to_json() if args.config is None else policy.into_config(read_config(args.config))
    write_document(args.out, document)
    wrote(args.out, json.dumps(policy.to_json()))


def _import(args: argparse.Namespace) -> None:
    from ...temporal.policy import import_policy, read_policy

    policy = read_policy(args.policy)
    result = import_policy(policy, args.steps, load_plan(args.plan, args.calibration))
    result.save(args.out)
    wrote(args.out, f"levels of {counted(args.steps, 'step')}, for mixdq generate --schedule")
    _print(result, args.json)
