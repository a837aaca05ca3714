"""Steps several small tensors as one, since a bias costs as many operator calls as a matrix.

Values, remainders, gradients and moments of the tensors are concatenated, stepped and written back. Every operator of a
step is elementwise, so the result is bit for bit that of stepping each tensor alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..compat import copy_all_
from .layout import flat, laid_out_like, local
from .moments import SMALLEST_8BIT
from .rules import Rule
from .split import REMAINDER
from .update import update

SMALL = 1 << 14
"""Tensors with fewer values are stepped together: calling the operators takes longer than copying the values."""
MOST = 1 << 16
"""Most values stepped together; their temporary copies take about 20 bytes per value."""
Entry = tuple[dict[str, Any], Tensor]


def lots(entries: Iterable[Entry], states: Mapping[Tensor, Mapping[str, Any]]) -> list[list[Entry]]:
    """Divides (group, parameter) pairs into lots that can be stepped as one; most lots hold one parameter.

    The parameters of a larger lot are small, not sharded, have the same group, device, dtype, gradient dtype and number
    of steps, and float32 moments (the dithering of bfloat16 moments depends on an element's position).
    """
    done: list[list[Entry]] = []
    filling: dict[Hashable, tuple[list[Entry], int]] = {}
    for group, p in entries:
        key = _kind(group, p, states.get(p, {}))
        lot, size = filling.get(key, ([], 0))
        if key is None or not lot or size + p.numel() > MOST:
            lot, size = [], 0
            done.append(lot)
        lot.append((group, p))
        filling[key] = lot, size + p.numel()
    return done


def _kind(group: Mapping[str, Any], p: Tensor, state: Mapping[str, Any]) -> Hashable | None:
    largest = {"float32": SMALL, "8bit": SMALLEST_8BIT}.get(group["moments"], 0)
    if p.numel() >= largest or isinstance(p, DTensor) or p.grad is None:
        return None
    return id(group), p.device, p.dtype, p.grad.dtype, int(state.get("step", 0))


def update_together(
    rule: Rule, params: Sequence[Tensor], states: Sequence[Mapping[str, Any]], moments: Sequence[str], **options: Any
) -> None:
    """Steps the parameters of one lot in place; ``options`` as for ``update``."""
    values = [local(p) for p in params]
    remainder = REMAINDER.get(params[0].dtype)
    names = [*([remainder] if remainder else []), *moments]
    flats = [[flat(t) for t in tensors] for tensors in [values, *([s[name] for s in states] for name in names)]]
    pairs = [(p.grad, v) for p, v in zip(params, values, strict=True) if p.grad is not None]
    gradient = torch.cat([flat(laid_out_like(local(g), v)) for g, v in pairs])
    joined = [torch.cat(tensors) for tensors in flats]
    rest, first = (joined[1], 2) if remainder else (None, 1)
    update(rule, joined[0], rest, gradient, joined[first:], compiled=False, **options)
    sizes = [p.numel() for p in params]
    for tensors, whole in zip(flats, joined, strict=True):
        copy_all_(tensors, whole.split(sizes))
