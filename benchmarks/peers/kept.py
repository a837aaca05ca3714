"""Results that a stopped run finds again."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixdq_ao.jsonfile import write_document

Row = dict[str, Any]


class Rows:
    """Finished rows by name, in a file after each. A contender that raises is a row that says why."""

    def __init__(self, path: Path, show: Callable[[str, Row], None]) -> None:
        self.path, self.show = path, show
        self.rows: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, name: str, measure: Callable[[], Row]) -> Row:
        if name not in self.rows:
            try:
                row = measure()
            except Exception as error:
                first = next(iter(str(error).splitlines()), "")
                row = {"error": f"{type(error).__name__}: {first[:200]}"}
            self.rows[name] = row
            write_document(self.path, self.rows)
            self.show(name, row)
            gc.collect()
        return self.rows[name]


def kept_seconds(path: Path, seconds: float) -> float:
    """The most seconds seen for a piece of work, kept in ``path``: one that finds its results again takes none."""
    if path.exists():
        seconds = max(seconds, json.loads(path.read_text())["seconds"])
    write_document(path, {"seconds": seconds})
    return seconds
