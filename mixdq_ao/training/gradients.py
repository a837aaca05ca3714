"""Checks of gradients before they are used (dense, finite), and their norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..compat import norms
from ..errors import OptimizerError
from .layout import across_shards, local


def refuse_sparse(grad: Tensor, name: str) -> NoReturn:
    kind = str(grad.layout).removeprefix("torch.")
    raise OptimizerError(
        f"{name}: the gradient is {kind}, expected a dense one: moments decay for every row at every step, "
        "as in torch.optim.AdamW; build the embedding with sparse=False"
    )


def is_finite(grad: Tensor) -> bool:
    """Whether the local part of a gradient has no NaN and no infinity. Synchronizes with the device."""
    values = local(grad)
    if values.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())  # one pass, no temporary; NaN goes through


def surely_finite(grads: Sequence[Tensor]) -> bool:
    """Whether the norms of all gradients are finite, so that they are too; needs one pass and one synchronization.

    False if a gradient is sharded (another process may have a NaN) or a norm overflows.
    """
    if any(isinstance(g, DTensor) for g in grads):
        return False
    devices: dict[torch.device, list[Tensor]] = {}
    for g in grads:
        devices.setdefault(g.device, []).append(g.detach())
    return all(bool(norms(here).isfinite().all()) for here in devices.values())


def finite_everywhere(pairs: Iterable[tuple[Tensor, bool]]) -> bool:
    """Whether the flags of all (parameter, flag) pairs are true, in every process that holds a shard of a parameter."""
    sharded: dict[object, tuple[Tensor, bool]] = {}
    here = True
    for p, flag in pairs:
        here = here and flag
        if isinstance(p, DTensor):
            key = (p.device_mesh, p.placements)
            sharded[key] = (p, flag and sharded.get(key, (p, True))[1])
    for p, flag in sharded.values():
        bad = torch.tensor(0.0 if flag else 1.0, device=local(p).device)
        here = bool(across_shards(bad, p, dist.ReduceOp.MAX) == 0) and here
    return here


def square_norm(grad: Tensor, p: Tensor) -> float:
    """Sum of squares of a gradient over all shards, accumulated in float32. Synchronizes with the device."""
    square = torch.linalg.vector_norm(local(grad), dtype=torch.float32).square()
    return float(across_shards(square, p))


def wide_square_norm(grad: Tensor, p: Tensor) -> float:
    """``square_norm`` in float64, which cannot overflow; for gradients whose square overflows float32."""
    square = torch.linalg.vector_norm(local(grad), dtype=torch.float64).square()
    return float(across_shards(square, p))
