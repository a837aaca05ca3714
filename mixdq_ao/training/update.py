"""One step of one tensor: join, apply the rule, split. Eagerly in cache-sized chunks, or as one compiled kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import moments as stored_moments
from .layout import flat, flat_alias
from .moments import Pieces
from .rules import Rule
from .split import join, split

_PART = 1 << 16
"""Values per CPU thread and chunk, so that temporaries stay in its cache; a multiple of 65536 (see ``dithered``)."""
_PART_OF_A_DEVICE = 1 << 24


def update(
    rule: Rule,
    visible: Tensor,
    remainder: Tensor | None,
    grad: Tensor,
    moments: Sequence[Tensor],
    *,
    numbers: Sequence[float],
    facts: tuple[bool, ...],
    factor: float,
    step: int,
    compiled: bool,
) -> None:
    """Steps one local, dense parameter in place.

    Args:
        visible: the parameter: bfloat16 or float16 with ``remainder`` (int16, same layout), or float32 with None.
        grad: any floating dtype, same layout; multiplied by ``factor`` in float32.
        moments: from ``new_moment``, in the order of ``rule.moments``.
        numbers, facts: from ``rule.scalars``.
    """
    dither = stored_moments.dither_of(step)
    if compiled and visible.numel() > 1:  # torch.compile specializes on a size of 1
        tensors = [None if t is None else flat_alias(t) for t in (visible, remainder, grad)]
        stored = [stored_moments.pieces(m, flat_alias) for m in moments]
        numbers_here = _as_tensors((*numbers, factor), dither, visible.device)
        compiled_kernel()(rule.compiled, *tensors, stored, *numbers_here, facts)
        increment_version(visible)
        return
    value, rest, gradient = flat(visible), None if remainder is None else flat(remainder), flat(grad)
    stored = [stored_moments.pieces(m) for m in moments]
    size = _PART * torch.get_num_threads() if value.device.type == "cpu" else _PART_OF_A_DEVICE
    if value.numel() <= size:
        _eager(rule, value, rest, gradient, stored, numbers, facts, factor, dither)
        return
    for start in range(0, value.numel(), size):
        stop = min(start + size, value.numel())
        cut = slice(start, stop)
        parts = [stored_moments.part(pieces, start, stop) for pieces in stored]
        rest_part = None if rest is None else rest[cut]
        _eager(rule, value[cut], rest_part, gradient[cut], parts, numbers, facts, factor, dither)


def _eager(
    rule: Rule,
    value: Tensor,
    rest: Tensor | None,
    gradient: Tensor,
    stored: list[Pieces],
    numbers: Sequence[float],
    facts: tuple[bool, ...],
    factor: float,
    dither: int,
) -> None:
    p = value if rest is None else join(value, rest)
    g = gradient.to(torch.float32)
    g = g if factor == 1 else g * factor
    loaded = [stored_moments.load(pieces) for pieces in stored]
    rule.eager(p, g, loaded, numbers, facts)
    for pieces, moment in zip(stored, loaded, strict=True):
        stored_moments.store(pieces, moment, dither)
    if rest is not None:
        new_value, new_rest = split(p, value.dtype)
        value.copy_(new_value)
        rest.copy_(new_rest)


def _kernel(
    rule: Callable[..., tuple[Tensor, list[Tensor]]],
    value: Tensor,
    rest: Tensor | None,
    gradient: Tensor,
    stored: list[Pieces],
    numbers: Tensor,
    dither: Tensor,
    facts: tuple[bool, ...],
) -> None:
    p = value if rest is None else join(value, rest)
    g = gradient.to(torch.float32) * numbers[-1]
    p, moments = rule(p, g, [stored_moments.load(pieces) for pieces in stored], numbers[:-1], facts)
    for pieces, moment in zip(stored, moments, strict=True):
        stored_moments.store(pieces, moment, dither)
    if rest is None:
        value.copy_(p)
    else:
        new_value, new_rest = split(p, value.dtype)
        value.copy_(new_value)
        rest.copy_(new_rest)


@cache
def compiled_kernel() -> Callable[..., None]:
    """The step as one graph for all sizes. Values that change between steps are tensors, so it is compiled once."""
    return torch.compile(_kernel, fullgraph=True, dynamic=True)


@cache
def _last(device: torch.device) -> dict[tuple[tuple[float, ...], int], tuple[Tensor, Tensor]]:
    return {}


def _as_tensors(numbers: tuple[float, ...], dither: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers on the device, rounded to float32 as torch's kernels round them; cached for the next tensor."""
    known = _last(device)
    if (numbers, dither) not in known:
        known.clear()
        known[numbers, dither] = (
            torch.tensor(numbers, dtype=torch.float64).to(torch.float32).to(device),
            torch.tensor(dither, dtype=torch.int32, device=device),
        )
    return known[numbers, dither]
