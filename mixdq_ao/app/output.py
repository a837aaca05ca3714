"""What the commands print: tables for people, JSON for programs, both on standard output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomicfile import obstacle
from ..errors import MixDQError


def show(title: str, rows: Mapping[str, str]) -> None:
    """A two-column table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(Text(name, style="cyan"), Text(value))
    Console().print(table)


def show_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table with a header; columns after the first are numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def wrote(path: Path, what: str) -> None:
    """Says where a result lies, on standard error so that standard output stays machine-readable."""
    from rich.text import Text

    from ..progress import console

    console.print(Text(f"wrote {path}: {what}"), soft_wrap=True)


def check_writable(path: Path, *, is_file: bool | None) -> None:
    """Raises MixDQError where a result could not be written to ``path``, a file or a folder (None: either): hours of
    work would be lost."""
    if is_file and path.is_dir():
        raise MixDQError(f"{path}: is a folder, expected the name of a file to write")
    if reason := obstacle(path, is_file=is_file):
        raise MixDQError(f"{path}: cannot be written, {reason}; choose another --out")


def counted(count: int, noun: str) -> str:
    """ "1 prompt", "2 prompts"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.2f} MiB"
