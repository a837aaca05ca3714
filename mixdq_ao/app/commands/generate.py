"""mixdq generate"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import MixDQError
from .. import options
from ..inputs import load_pipeline, plan_of, read_prompts
from ..output import counted, show_json, wrote

if TYPE_CHECKING:
    from ...temporal.plan import TemporalPlan

HELP = "draw pictures, with a plan, a precision for each step, or in full precision"
EXAMPLE = (
    "mixdq generate examples/shapes/pipeline --plan plan.json --steps 4 --out pictures "
    '--prompt "a large red circle in the middle on a black background"'
)
STEPS = 4


def arguments(parser: argparse.ArgumentParser) -> None:
    options.pipeline(parser)
    options.plan(parser, required=False)
    parser.add_argument(
        "--schedule",
        type=Path,
        metavar="FILE",
        help="from mixdq schedule: a precision for each step; --steps is its number of steps unless given",
    )
    options.storage(parser)
    options.calibration(parser, "ranges for a plan or a schedule without them")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw; may be given several times")
    texts.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line, UTF-8")
    options.sampling(parser, str(STEPS), 8)
    parser.set_defaults(steps=None, storage=None)
    parser.add_argument("--compile", action="store_true", help="compile the denoiser first; pays with many pictures")
    options.out(parser, "pictures", "folder for the PNG files")
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    _check(args)
    prompts = args.prompt or read_prompts(args.prompts)
    schedule = _schedule(args)
    plan = plan_of(args) if schedule is None else None
    args.steps = args.steps or (len(schedule.steps) if schedule else STEPS)
    from ...models.pipelines import Sampling, check_prompts, generate

    pipe = load_pipeline(args.pipeline, **options.where(args), steps=[args.steps])
    from ...evaluate.pictures import to_bytes
    from ...progress import progress
    from ..quantized import make_ready, make_scheduled, save_png

    check_prompts(prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    if schedule is None:
        make_ready(pipe, plan, compiled=args.compile)
    else:
        storage = args.storage or "nested"
        make_scheduled(pipe, schedule, storage=storage, keep_full=args.keep_full, compiled=args.compile)
    sampling = Sampling(**options.drawn(args))
    drawn: list[Path] = []
    start = time.perf_counter()
    with progress("drawing", len(prompts)) as bar:
        for batch in generate(pipe, prompts, sampling):
            for image in to_bytes(batch):
                drawn.append(save_png(image, args.out, len(drawn), prompts[len(drawn)]))
            bar.advance(len(batch))
    wrote(args.out, counted(len(drawn), "picture"))
    if args.json:
        show_json({"pictures": [str(path) for path in drawn], "seconds": round(time.perf_counter() - start, 3)})


def _check(args: argparse.Namespace) -> None:
    """Raises MixDQError for options that would have no effect or exclude each other."""
    if args.schedule is None:
        for name in ("storage", "keep_full"):
            if getattr(args, name):
                flag = options.flag(name)
                raise MixDQError(f"{flag} says how a schedule's levels are held; give --schedule too")
    elif args.plan is not None:
        raise MixDQError("--plan and --schedule are both given; a schedule has the plans of its levels in itself")


def _schedule(args: argparse.Namespace) -> TemporalPlan | None:
    """The schedule of ``--schedule``, if any. Raises MixDQError if ``--steps`` differs from its number of steps."""
    if args.schedule is None:
        return None
    from ...search.calibration import Calibration
    from ...temporal.plan import TemporalPlan

    schedule = TemporalPlan.load(args.schedule)
    if args.steps not in (None, len(schedule.steps)):
        raise MixDQError(
            f"--steps is {args.steps}, but {args.schedule} is for {counted(len(schedule.steps), 'step')}; leave out "
            f"--steps, or search a schedule for {counted(args.steps, 'step')}"
        )
    return schedule if args.calibration is None else schedule.with_calibration(Calibration.load(args.calibration))
