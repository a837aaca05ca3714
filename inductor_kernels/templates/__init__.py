"""Triton sources: one kernel body for all bit widths, with integer or floating point activations."""

import re
from importlib import resources


def source(name: str) -> str:
    """The text of a template with its ``{% include "file" %}`` lines filled in."""
    text = resources.files(__name__).joinpath(name).read_text()
    return re.sub(r'\{% include "([\w.]+)" %\}\n', lambda match: source(match[1]), text)
