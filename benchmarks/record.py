"""The command that made a file of results, to be recorded in the file."""

from __future__ import annotations

import shlex
import sys

PLACES = ("--work", "--out")
"""Options for paths, on which figures do not depend."""


def command(module: str) -> str:
    """``python -m module`` with this process's arguments, without those of PLACES."""
    kept, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and not argument.startswith(PLACES):
            kept.append(argument)
        skip = argument in PLACES
    return shlex.join(["python", "-m", module, *kept])
