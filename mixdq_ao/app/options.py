"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..atomicfile import obstacle
from ..errors import MixDQError
from .inputs import at_least, between, finite, integers, multiple_of

LARGEST_SEED = 2**63 - 1
"""Seeds of further prompts, counted from there, still are what torch takes."""
MACHINE = ("device", "dtype", "variant")
SIZE = ("height", "width", "frames")
SAMPLING = ("steps", "guidance_scale", "seed", "batch_size", *SIZE)


def command(commands: argparse._SubParsersAction[Any], name: str, text: str, example: str) -> argparse.ArgumentParser:
    """The parser of a command, or of one of the kinds of a command; its help ends with an example."""
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pipeline", metavar="PIPELINE", help="directory of a diffusers pipeline, or its name on the hub"
    )
    machine(parser)


def machine(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Where a pipeline runs, in which type, and of which files."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of the weights (default: float32 on a CPU, float16 elsewhere)",
    )
    parser.add_argument("--variant", metavar="NAME", help="of the files, as fp16 for those named *.fp16.safetensors")


def where(args: argparse.Namespace) -> dict[str, Any]:
    """What ``machine`` says, for ``load_pipeline``."""
    return {name: getattr(args, name) for name in MACHINE}


def prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one prompt a line, UTF-8")


def sampling(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    steps: str,
    batch_size: int,
    *,
    several: bool = False,
    frames: bool = True,
) -> None:
    """Steps (a list where ``several``), guidance, batch size, seed and size: those of SAMPLING."""
    text = "denoising steps, separated by commas where several" if several else "denoising steps"
    kind: Any = integers if several else at_least(1)
    parser.add_argument("--steps", type=kind, default=kind(steps), metavar="N", help=f"{text} (default {steps})")
    parser.add_argument(
        "--guidance-scale",
        type=finite,
        default=0.0,
        metavar="X",
        help="classifier-free guidance; 0 turns it off, as few-step models want (default)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=batch_size,
        metavar="N",
        help=f"prompts at once (default {batch_size})",
    )
    parser.add_argument(
        "--seed",
        type=between(0, LARGEST_SEED),
        default=0,
        metavar="N",
        help="prompt i starts from the noise of seed N + i (default 0)",
    )
    size(parser, frames=frames)


def size(parser: argparse.ArgumentParser | argparse._ArgumentGroup, *, frames: bool = True) -> None:
    """Of what is drawn: the options of SIZE."""
    text = "pixels, a multiple of 8 (default: the model's own)"
    for name in ("height", "width"):
        parser.add_argument(f"--{name}", type=multiple_of(8), metavar="N", help=text)
    if frames:
        parser.add_argument("--frames", type=at_least(1), metavar="N", help="of a video (default: the pipeline's own)")


def sized(args: argparse.Namespace) -> dict[str, Any]:
    """What ``size`` says, as fields of Sampling."""
    return {name: getattr(args, name) for name in SIZE}


def drawn(args: argparse.Namespace) -> dict[str, Any]:
    """What ``sampling`` says, as fields of Sampling; those that are not given are left out."""
    return {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}


def calibration(parser: argparse.ArgumentParser, why: str) -> None:
    parser.add_argument("--calibration", type=Path, metavar="FILE", help=f"from mixdq calibrate: {why}")


def plan(parser: argparse.ArgumentParser, *, required: bool) -> None:
    what = "from mixdq allocate or mixdq import" + ("" if required else " (default: full precision)")
    parser.add_argument("--plan", type=Path, required=required, metavar="FILE", help=what)


def storage(parser: argparse.ArgumentParser) -> None:
    """How a model holds the levels of a schedule."""
    parser.add_argument(
        "--storage",
        choices=("nested", "own"),
        default="nested",
        help="of a schedule's levels; nested: all in the bytes of one 8-bit model (default); own: codes for each width",
    )
    parser.add_argument("--keep-full", action="store_true", help="16 bit is the model's own weight, kept as well")


def out(parser: argparse.ArgumentParser, default: str, what: str) -> None:
    """Where the result goes: a file where the default has an ending, else a folder. Checked before a command runs."""
    parser.set_defaults(out_is_file=bool(Path(default).suffix))
    parser.add_argument("--out", type=Path, default=Path(default), metavar="PATH", help=f"{what} (default {default})")


def check_files(args: argparse.Namespace, *names: str) -> None:
    """Of options that name files to write, before the work. Raises MixDQError where a file could not be written."""
    for name in names:
        path = getattr(args, name)
        if path is None:
            continue
        if path.is_dir():
            raise MixDQError(f"{flag(name)} is {path}, a folder; expected the name of a file to write")
        if reason := obstacle(path, is_file=True):
            raise MixDQError(f"{flag(name)} is {path}, which cannot be written: {reason}; choose another")


def check_apart(args: argparse.Namespace, *names: str) -> None:
    """Raises MixDQError where two of these options name one place."""
    known: dict[Path, str] = {}
    for name in names:
        path = getattr(args, name)
        other = None if path is None else known.setdefault(path.resolve(), name)
        if other not in (None, name):
            raise MixDQError(f"{flag(other)} and {flag(name)} are both {path}; one would replace the other, name two")


def as_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def flag(name: str) -> str:
    """An option as it is given, by the name its value is stored under."""
    return "--" + name.replace("_", "-")
