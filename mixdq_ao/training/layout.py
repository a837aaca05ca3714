"""Tensors as flat arrays in memory order, and the local part of those that are sharded."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flat(t: Tensor) -> Tensor:
    """A view [n] of a dense tensor in memory order; writes to it count as writes to ``t`` for autograd."""
    if t.dim() == 1 and t.is_contiguous():
        return t
    return t.view(-1) if t.is_contiguous() else torch.as_strided(t, (t.numel(),), (1,))


def flat_alias(t: Tensor) -> Tensor:
    """The memory of a dense tensor as [n], without being a view: compiled code looks the same for all of them.

    Writes to it do not count as writes to ``t``: see ``torch.autograd.graph.increment_version``.
    """
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(
        t.untyped_storage(), t.storage_offset(), (t.numel(),), (1,)
    )


def laid_out_like(t: Tensor, p: Tensor) -> Tensor:
    """``t``, copied where its order in memory is not that of ``p`` (same shape)."""
    same = t.stride() == p.stride() or (t.is_contiguous() and p.is_contiguous())
    return t if same else torch.empty_like(p, dtype=t.dtype).copy_(t)


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor, without gradient history."""
    if isinstance(t, DTensor):
        with torch.no_grad():  # then it is the very tensor, with its own version counter
            t = t.to_local()
    return t.detach() if t.requires_grad else t


def version(t: Tensor) -> tuple[int, int]:
    """Changes with every write to ``t``: through its name, or (if it is sharded) to the local part."""
    return t._version, local(t)._version if isinstance(t, DTensor) else t._version


def sharded_like(t: Tensor, p: Tensor) -> Tensor:
    """The local tensor ``t`` in the place that ``local(p)`` has in ``p``."""
    if not isinstance(p, DTensor):
        return t
    return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def across_shards(value: Tensor, p: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """``value`` of the local part of ``p``, reduced in place over the processes that hold the other parts."""
    if isinstance(p, DTensor):
        for dim, placement in enumerate(p.placements):
            if not isinstance(placement, Replicate):
                dist.all_reduce(value, op, group=p.device_mesh.get_group(dim))
    return value
