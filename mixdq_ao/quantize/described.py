"""``print(model)`` says how each layer is quantized."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..layers import find_products
from .tensor import is_quantized


def describe_layers(model: nn.Module) -> None:
    """From now on each layer that is quantized prints its precision behind its sizes, as ``W4A8 BOS``."""
    for module in find_products(model).values():
        if is_quantized(module.weight):
            # No bound method: that of a function which is no attribute of the module cannot be unpickled.
            module.extra_repr = partial(_sizes_and_precision, module)


def _sizes_and_precision(module: Any) -> str:
    sizes, weight = type(module).extra_repr(module), module.weight
    return f"{sizes}, {weight.describe()}" if is_quantized(weight) else sizes
