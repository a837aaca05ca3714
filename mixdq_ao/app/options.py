"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..atomicfile import obstacle
from ..errors import MixDQError
from .inputs import at_least, between, finite, integers, multiple_of

LARGEST_SEED = 2**63 - 1
"""Leaves room for the seeds of further prompts, which count up from there, below torch's limit of 2^64."""
MACHINE = ("device", "dtype", "variant")
SIZE = ("height", "width", "frames")
SAMPLING = ("steps", "guidance_scale", "seed", "batch_size", *SIZE)


def command(commands: argparse._SubParsersAction[Any], name: str, text: str, example: str) -> argparse.ArgumentParser:
    """The parser of a command or subcommand; its help ends with an example."""
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
    """Options for the device, the dtype and the variant of a pipeline's files."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of the weights (default: float32 on a CPU, float16 elsewhere)",
    )
    parser.add_argument("--variant", metavar="NAME", help="of the files, as fp16 for those named *.fp16.safetensors")


def where(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the options of ``machine``, as arguments of ``load_pipeline``."""
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
    """The options of SAMPLING: steps (a list if ``several``), guidance, batch size, seed and size."""
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
    """The options of SIZE: the size of the pictures or videos."""
    text = "pixels, a multiple of 8 (default: the model's own)"
    for name in ("height", "width"):
        parser.add_argument(f"--{name}", type=multiple_of(8), metavar="N", help=text)
    if frames:
        parser.add_argument("--frames", type=at_least(1), metavar="N", help="of a video (default: the pipeline's own)")


def sized(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the options of ``size``, as fields of Sampling."""
    return {name: getattr(args, name) for name in SIZE}


def drawn(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the options of ``sampling`` that are given, as fields of Sampling."""
    return {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}


def calibration(parser: argparse.ArgumentParser, why: str) -> None:
    parser.add_argument("--calibration", type=Path, metavar="FILE", help=f"from mixdq calibrate: {why}")


def plan(parser: argparse.ArgumentParser, *, required: bool) -> None:
    what = "from mixdq allocate or mixdq import" + ("" if required else " (default: full precision)")
    parser.add_argument("--plan", type=Path, required=required, metavar="FILE", help=what)


def storage(parser: argparse.ArgumentParser) -> None:
    """Options for how a model stores the levels of a schedule."""
    parser.add_argument(
        "--storage",
        choices=("nested", "own"),
        default="nested",
        help="of a schedule's levels; nested: all in the bytes of one 8-bit model (default); own: codes for each width",
    )
    parser.add_argument("--keep-full", action="store_true", help="16 bit is the model's own weight, kept as well")


def out(parser: argparse.ArgumentParser, default: str, what: str) -> None:
    """``--out``: a file if the default has a suffix, else a folder. ``main`` checks it before the command runs."""
    parser.set_defaults(out_is_file=bool(Path(default).suffix))
    parser.add_argument("--out", type=Path, default=Path(default), metavar="PATH", help=f"{what} (default {default})")


def check_files(args: argparse.Namespace, *names: str) -> None:
    """Checks options that name files to write, before the work. Raises MixDQError if one cannot be written."""
    for name in names:
        path = getattr(args, name)
        if path is not None:
            check_writable(name, path, is_file=True)


def check_writable(name: str, path: Path, *, is_file: bool | None) -> None:
    """Raises MixDQError if option ``name`` is a ``path`` that cannot be written, as a file (``is_file``), a folder
    (False) or either (None)."""
    if is_file and path.is_dir():
        raise MixDQError(f"{flag(name)} is {path}, a folder; expected the name of a file to write")
    if reason := obstacle(path, is_file=is_file):
        raise MixDQError(f"{flag(name)} is {path}, which cannot be written: {reason}; choose another")


def check_apart(args: argparse.Namespace, *names: str) -> None:
    """Raises MixDQError if two of these options name the same path."""
    known: dict[Path, str] = {}
    for name in names:
        path = getattr(args, name)
        other = None if path is None else known.setdefault(path.resolve(), name)
        if other not in (None, name):
            raise MixDQError(f"{flag(other)} and {flag(name)} are both {path}; one would replace the other, name two")


def as_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def flag(name: str) -> str:
    """The option whose value is stored under ``name``: "--keep-full" for "keep_full"."""
    return "--" + name.replace("_", "-")
