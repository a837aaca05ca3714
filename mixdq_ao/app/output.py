"""What the commands print: tables for people, JSON for programs, both on standard output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


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
    """Prints where a result was written, on standard error so that standard output stays machine-readable."""
    from rich.text import Text

    from ..progress import console

    console.print(Text(f"wrote {path}: {what}"), soft_wrap=True)


def counted(count: int, noun: str) -> str:
    """ "1 prompt", "2 prompts"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.2f} MiB"
