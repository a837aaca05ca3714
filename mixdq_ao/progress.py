"""The progress bar of every long operation; a single line of text where standard error is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)


class Bar:
    """Handle of a running progress bar."""

    def __init__(self, bar: Progress | None, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, by: int = 1, note: str | None = None) -> None:
        """Marks ``by`` more items as done; ``note`` names the current one."""
        if self._bar is not None:
            fields: dict[str, Any] = {} if note is None else {"note": note}
            self._bar.update(self._task, advance=by, **fields)


@contextmanager
def progress(title: str, total: int) -> Iterator[Bar]:
    """A bar on standard error with elapsed and remaining time; in a log, one line when it is done."""
    if not console.is_terminal:
        start = time.monotonic()
        yield Bar(None, TaskID(0))
        console.print(f"{title}: {total} in {time.monotonic() - start:.0f} s", highlight=False)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield Bar(bar, bar.add_task(title, total=total, note=""))
