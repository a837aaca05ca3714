"""A denoiser's prediction as one tensor, whichever form its forward returns it in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MixDQError


def denoised(output: Any) -> Tensor:
    """The prediction in ``output`` as one tensor [B, ...].

    A list with one tensor per sample (Z-Image) is stacked. Several predictions (LTX-2: video and sound) are laid side
    by side, [B, n], each scaled by sqrt(size of the largest / its own size), so that their mean squared errors have
    equal weight. Raises MixDQError if there is no floating-point tensor.
    """
    tensors = [tensor for _, tensor in _predictions(output)]
    if not tensors:
        raise MixDQError(f"the model gave {type(output).__name__} without a floating-point tensor, expected one")
    return tensors[0] if len(tensors) == 1 else torch.cat([t.flatten(1) * f for t, f in _scaled(tensors)], 1)


def with_denoised(output: Any, value: Tensor) -> Any:
    """``output`` with ``value`` in place of ``denoised(output)``."""
    keys, tensors = zip(*_predictions(output), strict=True)
    values: Sequence[Tensor] = [value]
    if len(tensors) > 1:
        parts = value.split([t[0].numel() for t in tensors], 1)
        values = [(part / f).reshape(t.shape) for part, (t, f) in zip(parts, _scaled(tensors), strict=True)]
    items = dict(_items(output))
    for key, new in zip(keys, values, strict=True):
        items[key] = list(new) if isinstance(items[key], list) else new
    if isinstance(output, Tensor | list):
        return items[None]
    return tuple(items.values()) if isinstance(output, tuple) else type(output)(**items)


def _items(output: Any) -> Iterator[tuple[Any, Any]]:
    """What an output consists of, by key: an index, a field's name, or None for an output that is the prediction."""
    if isinstance(output, Tensor | list):
        yield None, output
    elif isinstance(output, tuple):
        yield from enumerate(output)
    elif isinstance(output, Mapping):  # diffusers' output classes
        yield from output.items()
    else:
        yield "sample", output.sample


def _predictions(output: Any) -> Iterator[tuple[Any, Tensor]]:
    """The floating-point tensors of an output, lists of samples stacked."""
    for key, item in _items(output):
        if isinstance(item, list) and item and all(isinstance(t, Tensor) for t in item):
            if len({t.shape for t in item}) > 1:
                shapes = [list(t.shape) for t in item]
                raise MixDQError(f"the model gave samples of shapes {shapes}, expected the same for all")
            item = torch.stack(item)
        if isinstance(item, Tensor) and item.is_floating_point():
            yield key, item


def _scaled(tensors: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
    largest = max(t[0].numel() for t in tensors)
    return [(t, math.sqrt(largest / t[0].numel())) for t in tensors]
