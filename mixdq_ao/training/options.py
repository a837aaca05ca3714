"""Checks of options and parameters. Each raises OptimizerError naming the value and what was expected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import OptimizerError
from .layout import is_dense, local
from .split import REMAINDER

NONFINITE = ("raise", "skip", "propagate")


def check_number(value: Any, what: str, below: float = math.inf) -> None:
    number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    if not number or not 0 <= float(value) < below:
        limit = "" if below == math.inf else f" and below {below:g}"
        raise OptimizerError(f"{what} is {value!r}, expected a number from 0 up{limit}")


def check_parameter(p: Any, name: str) -> None:
    if not isinstance(p, Tensor):
        return  # torch raises its own error
    if p.dtype not in (torch.float32, *REMAINDER):
        raise OptimizerError(f"{name} is {p.dtype}, expected torch.bfloat16, torch.float16 or torch.float32")
    if p.layout is not torch.strided or not is_dense(local(p)):
        raise OptimizerError(f"{name} does not fill its memory (strides {p.stride()}); use a contiguous parameter")


def check_choice(value: Any, choices: tuple[str, ...], what: str) -> None:
    if value not in choices:
        raise OptimizerError(f"{what} is {value!r}, expected one of {', '.join(choices)}")
