"""What is asked of gradients before they are used: that they are dense and finite, and how large they are."""

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
    """Whether the part of a gradient that is here has no NaN and no infinity. Waits for the device."""
    values = local(grad)
    if values.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())  # one pass, no temporary; NaN goes through


def surely_finite(grads: Sequence[Tensor]) -> bool:
    """Whether one pass and one wait for the device say that all gradients are finite: their norms are.

    No where they are sharded (another process may have a NaN), and where a norm overflows.
    """
    if any(isinstance(g, DTensor) for g in grads):
        return False
    devices: dict[torch.device, list[Tensor]] = {}
    for g in grads:
        devices.setdefault(g.device, []).append(g.detach())
    return all(bool(norms(here).isfinite().all()) for here in devices.values())


def finite_everywhere(pairs: Iterable[tuple[Tensor, bool]]) -> bool:
    """Whether all flags are true, of (parameter, flag) pairs, in every process that shards one of the parameters."""
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
    """Sum of squares of a gradient, over all shards; accumulated in float32. Waits for the device."""
    square = torch.linalg.vector_norm(local(grad), dtype=torch.float32).square()
    return float(across_shards(square, p))


def wide_square_norm(grad: Tensor, p: Tensor) -> float:
    """``square_norm`` in float64, which holds the square of every float32: for a gradient where float32 overflows."""
    square = torch.linalg.vector_norm(local(grad), dtype=torch.float64).square()
    return float(across_shards(square, p))
