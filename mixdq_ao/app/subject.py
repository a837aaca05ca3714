"""Finds the bundled pipeline, which is in the repository's examples and not in the installed package."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import MixDQError


def bundled() -> Any:
    """The module ``examples.shapes.subject``: load_pipeline(), prompts(n, seed=, held_out=), load_scorer().

    Raises MixDQError if the package is not in a checkout of the repository.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "examples" / "shapes" / "subject.py").is_file():
        raise MixDQError(
            "the demo uses the pipeline in the repository's examples/shapes, which an installed wheel does not carry; "
            "run it from a checkout of mixdq-ao (make demo)"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return import_module("examples.shapes.subject")
