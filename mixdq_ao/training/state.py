"""Creates a parameter's state, and adapts it to the parameter's current dtype, memory order and options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchao.optim.subclass_8bit import OptimState8bit

from ..errors import OptimizerError
from .layout import laid_out_like, local, sharded_like
from .moments import dither_of, kind_for, kind_of, load, new_moment, pieces, store
from .split import REMAINDER


def new_state(p: Tensor, kind: str, moments: Mapping[str, bool]) -> dict[str, Any]:
    """A state of zeros: "step" (float32 scalar), the remainder if p is 16 bit, and the moments. Tensors have the memory
    order and the sharding of p.

    Args:
        kind: storage of the moments, one of ``moments.KINDS``.
        moments: {name: whether it is signed}.
    """
    here = local(p)
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32)}
    follow_type(state, p)
    for name, signed in moments.items():
        state[name] = sharded_like(new_moment(here, kind, signed=signed), p)
    return state


def follow_type(state: dict[str, Any], p: Tensor) -> None:
    """Replaces the remainder in a state if ``p`` has another dtype now: by zeros, so that the visible value counts."""
    own = REMAINDER.get(p.dtype)
    for name in REMAINDER.values():
        if name != own:
            state.pop(name, None)
    if own is not None and own not in state:
        state[own] = sharded_like(torch.zeros_like(local(p), dtype=torch.int16), p)


def common_kind(moments: Iterable[Any]) -> str | None:
    """The storage of all these moments; None if it differs between them or one is not a moment."""
    kinds = {kind_of(local(m)) if isinstance(m, Tensor) else None for m in moments}
    return kinds.pop() if len(kinds) == 1 else None


def follow(
    state: dict[str, Any], p: Tensor, kind: str, moments: Mapping[str, bool], name_of: Callable[[Tensor], str]
) -> None:
    """Converts a state to the current memory order of ``p``, and its ``moments`` to the storage that options ask for.

    Raises:
        OptimizerError: 8-bit moments of a parameter whose order changed.
    """
    here = local(p)
    for name, value in state.items():
        held = local(value)
        if held.dim() == 0 or held.stride() == here.stride():
            continue
        if isinstance(held, OptimState8bit):
            raise OptimizerError(
                f"{name_of(p)}: its order in memory changed after its first step, to strides {here.stride()}; "
                '8-bit moments cannot follow: change it before, or use moments="bfloat16"'
            )
        state[name] = sharded_like(laid_out_like(held, here), p)
    for name, signed in moments.items():
        held = local(state[name])
        if kind_of(held) != kind_for(here, kind):
            fresh = new_moment(here, kind, signed=signed)
            store(pieces(fresh), load(pieces(held)), dither_of(int(state["step"])))
            state[name] = sharded_like(fresh, p)
