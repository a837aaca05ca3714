"""Notebooks are stored without what they printed: python -m tests.notebook FILE ... ends with 1 where one is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def is_clean(path: Path) -> bool:
    """Whether no code cell holds an output or a count."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


if __name__ == "__main__":
    bad = [name for name in sys.argv[1:] if not is_clean(Path(name))]
    sys.exit(f"clear the outputs of {', '.join(bad)}" if bad else 0)
