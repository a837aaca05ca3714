"""Names of the allocation objectives, in a module without heavy imports so that the command line starts fast."""

from __future__ import annotations

from typing import Literal, get_args

Objective = Literal["additive", "decoupled", "sqnr"]
OBJECTIVES = get_args(Objective)
