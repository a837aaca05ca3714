"""The ``mixdq`` command line. Each command reads and writes files, so the steps can be run one at a time."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from ..errors import MixDQError
from . import options
from .inputs import first_line
from .quiet import silence

COMMANDS = {
    "demo": "demo",
    "calibrate": "calibrate",
    "moments": "moments",
    "analyze": "analyze",
    "allocate": "allocate",
    "quantize": "quantize",
    "compile": "compile",
    "generate": "generate",
    "recover": "recover",
    "schedule": "schedule",
    "evaluate": "evaluate",
    "import": "import_",
    "report": "report",
    "bench": "bench",
    "doctor": "doctor",
    "completion": "completion",
}
STEPS = (
    "Step by step: calibrate, analyze, allocate, then quantize or generate. `mixdq COMMAND --help` shows an example."
)


class Parser(argparse.ArgumentParser):
    """A parser with ``--traceback``, whose errors are one line that starts with the name of the command."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        text = "show errors in full"
        self.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=text)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown arguments in the parser of the command. argparse would pass them up to the top parser, whose
        error refers to ``mixdq --help`` and not to the help of the command."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    top: argparse.ArgumentParser = Parser(
        prog="mixdq",
        description="Mixed-precision quantization of few-step diffusion models.",
        epilog=STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, module in COMMANDS.items():
        command = import_module(f".commands.{module}", __package__)
        sub = options.command(commands, name, command.HELP, command.EXAMPLE)
        command.arguments(sub)
        sub.set_defaults(run=command.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 0, 2 for an error the user can act on, 1 for a bug, 130 for Ctrl-C."""
    args = parser().parse_args(arguments)
    silence()
    try:
        if isinstance(getattr(args, "out", None), Path):
            options.check_writable("out", args.out, is_file=getattr(args, "out_is_file", None))
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail(args, "stopped", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MixDQError, OSError) as e:
        return _fail(args, f"error: {first_line(e)}", 2)
    except Exception as e:
        if getattr(args, "traceback", False):
            raise
        return _fail(args, f"unexpected {type(e).__name__}: {first_line(e)} (--traceback shows where)", 1)
    return 0


def _fail(args: argparse.Namespace, message: str, code: int) -> int:
    if getattr(args, "traceback", False):
        import traceback

        traceback.print_exc()
    print(f"mixdq: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
