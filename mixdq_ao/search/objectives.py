"""What an allocation by errors may optimise, alone: the command line offers the names and imports no more to start."""

from __future__ import annotations

from typing import Literal, get_args

Objective = Literal["additive", "decoupled", "sqnr"]
OBJECTIVES = get_args(Objective)
