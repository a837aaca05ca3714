"""Whether two models hold the same tensors, to the bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixdq_ao.quantize.tensor import MixDQTensor, SplitMixDQTensor

from .memory import plain


def attributes(tensor: Tensor) -> list[Any]:
    if isinstance(tensor, SplitMixDQTensor):
        return [tensor.split, *attributes(tensor.first), *attributes(tensor.second)]
    own = [type(tensor).__name__, tensor.dtype, tuple(tensor.shape)]
    return [*own, tensor.bits, tensor.length, tensor.act_levels] if isinstance(tensor, MixDQTensor) else own


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Names, classes, attributes, types, shapes and bytes of every tensor and of every tensor inside it."""
    state, found = model.state_dict(), other.state_dict()
    assert list(state) == list(found)
    for name, tensor in state.items():
        assert attributes(tensor) == attributes(found[name]), name
        for a, b in zip(plain(tensor), plain(found[name]), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert torch.equal(
                a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
            ), name
