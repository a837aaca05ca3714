"""Concatenation of weights that read the same input: one product instead of several, with the same results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import QuantizationError
from .tensor import MixDQTensor

SAME = ("bits", "length", "dtype", "act_levels", "shared_key")
"""Attributes that weights must have in common: precision, input, activation parameters and BOS embedding."""


def joined(weights: Sequence[MixDQTensor]) -> MixDQTensor:
    """Concatenates weights [N_i, ...] to one [sum N_i, ...]; each output channel keeps its scale and zero point.

    Raises:
        QuantizationError: ``weights`` is empty, or they differ in precision, activation parameters or kind.
    """
    if not weights:
        raise QuantizationError("joined: expected at least one weight, got none")
    first = weights[0]
    for weight in weights[1:]:
        if reason := difference(first, weight):
            raise QuantizationError(f"joined: {weight!r} and {first!r} differ in {reason}; only equals can be joined")
    tensors: dict[str, Tensor] = first.stored_tensors()
    for name in tensors:
        if name not in first.shared_tensors:
            tensors[name] = torch.cat([getattr(weight, name) for weight in weights])
    attributes = {name: getattr(first, name) for name in SAME}
    return MixDQTensor(**tensors, **attributes)  # type: ignore[arg-type]


def difference(a: MixDQTensor, b: MixDQTensor) -> str | None:
    """The difference that keeps two weights from being joined, in words; None if they can be."""
    for name in SAME:
        if getattr(a, name) != getattr(b, name):
            return f"{name} ({getattr(b, name)!r}, {getattr(a, name)!r})"
    if a.qdata.shape[1:] != b.qdata.shape[1:]:
        return f"shape ({tuple(b.shape)}, {tuple(a.shape)})"
    if a.stored_tensors().keys() != b.stored_tensors().keys():
        return "what they hold besides the integers"
    return None
