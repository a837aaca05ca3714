"""Makes ``print(model)`` show how each layer is quantized."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..layers import find_products
from .tensor import is_quantized


def describe_layers(model: nn.Module) -> None:
    """Makes each quantized layer print its precision after its sizes, as ``W4A8 BOS``."""
    for module in find_products(model).values():
        if is_quantized(module.weight):
            # A partial, since a bound method of a function that is not an attribute of the class cannot be unpickled.
            module.extra_repr = partial(_sizes_and_precision, module)


def _sizes_and_precision(module: Any) -> str:
    sizes, weight = type(module).extra_repr(module), module.weight
    return f"{sizes}, {weight.describe()}" if is_quantized(weight) else sizes
