"""mixdq generate"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .. import options
from ..inputs import load_pipeline, load_plan, read_prompts
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
    parser.set_defaults(steps=None)
    parser.add_argument("--compile", action="store_true", help="compile the denoiser first; pays with many pictures")
    options.out(parser, "pictures", "folder for the PNG files")
    options.as_json(parser)


def run(args: argparse.Namespace) -> None:
    prompts = args.prompt or read_prompts(args.prompts)
    schedule = _schedule(args)
    plan = load_plan(args.plan, args.calibration) if args.plan else None
    args.steps = args.steps or (len(schedule.steps) if schedule else STEPS)
    args.out.mkdir(parents=True, exist_ok=True)
    from mixdq_ao.models.pipelines import Sampling, check_prompts, generate

    pipe = load_pipeline(args.pipeline, device=args.device, dtype=args.dtype)
    from ...evaluate.pictures import to_bytes
    from ...progress import progress
    from ..quantized import make_ready, make_scheduled, save_png

    check_prompts(prompts)
    if schedule is None:
        make_ready(pipe, plan, compiled=args.compile)
    else:
        make_scheduled(pipe, schedule, storage=args.storage, keep_full=args.keep_full, compiled=args.compile)
    names = ("steps", "guidance_scale", "seed", "batch_size")
    sampling = Sampling(**{name: getattr(args, name) for name in names})
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


def _schedule(args: argparse.Namespace) -> TemporalPlan | None:
    """The schedule asked for, for the steps asked for."""
    if args.schedule is None:
        return None
    from ...errors import ScheduleError
    from ...search.calibration import Calibration
    from ...temporal.plan import TemporalPlan

    if args.plan is not None:
        raise ScheduleError("--plan and --schedule are both given; a schedule has the plans of its levels in itself")
    schedule = TemporalPlan.load(args.schedule)
    schedule.validate(args.steps or len(schedule.steps))
    return schedule if args.calibration is None else schedule.with_calibration(Calibration.load(args.calibration))
