"""mixdq completion"""

from __future__ import annotations

import argparse

HELP = "print a script that completes commands, options and files in a shell"
EXAMPLE = 'eval "$(mixdq completion bash)"'
SHELLS = ("bash", "zsh", "tcsh")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell to write it for")


def run(args: argparse.Namespace) -> None:
    from ...errors import MixDQError
    from ..cli import parser

    try:
        import shtab
    except ImportError:
        raise MixDQError("completion needs shtab: pip install 'mixdq-ao[completion]'") from None
    top = parser()
    _complete_paths(top, {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY, "PIPELINE": shtab.DIRECTORY}, shtab.FILE)
    print(shtab.complete(top, args.shell))


def _complete_paths(parser: argparse.ArgumentParser, by_metavar: dict, other: dict) -> None:
    """Enables path completion for every option that takes a path, told by its metavar, also in nested parsers."""
    from pathlib import Path

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _complete_paths(sub, by_metavar, other)
        elif action.metavar in by_metavar or action.type is Path:
            action.complete = by_metavar.get(action.metavar, other)  # type: ignore[attr-defined]
