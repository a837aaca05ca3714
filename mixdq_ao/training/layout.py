"""Tensors as flat arrays in memory order, and the local parts of sharded tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one contiguous range of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flat(t: Tensor) -> Tensor:
    """A view [n] of a dense tensor in memory order; a write to it moves the version counter of ``t``."""
    if t.dim() == 1 and t.is_contiguous():
        return t
    return t.view(-1) if t.is_contiguous() else torch.as_strided(t, (t.numel(),), (1,))


def flat_alias(t: Tensor) -> Tensor:
    """A tensor [n] over the memory of a dense tensor that is not a view of it, so that compiled code has no guards on
    the base.

    A write to it does not move the version counter of ``t``: see ``torch.autograd.graph.increment_version``.
    """
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(
        t.untyped_storage(), t.storage_offset(), (t.numel(),), (1,)
    )


def laid_out_like(t: Tensor, p: Tensor) -> Tensor:
    """``t``, or a copy in the memory order of ``p`` (of the same shape) if its order differs."""
    same = t.stride() == p.stride() or (t.is_contiguous() and p.is_contiguous())
    return t if same else torch.empty_like(p, dtype=t.dtype).copy_(t)


def local(t: Tensor) -> Tensor:
    """The part of a tensor that this process holds, without gradient history."""
    if isinstance(t, DTensor):
        with torch.no_grad():  # returns the local tensor itself, with its own version counter
            t = t.to_local()
    return t.detach() if t.requires_grad else t


def version(t: Tensor) -> tuple[int, int]:
    """Version counters of ``t`` and its local part; one of them moves with every write."""
    return t._version, local(t)._version if isinstance(t, DTensor) else t._version


def sharded_like(t: Tensor, p: Tensor) -> Tensor:
    """A tensor sharded like ``p`` whose local part is ``t``; ``t`` itself if ``p`` is not sharded."""
    if not isinstance(p, DTensor):
        return t
    return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def across_shards(value: Tensor, p: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduces ``value``, computed from the local part of ``p``, in place over the processes that hold the others."""
    if isinstance(p, DTensor):
        for dim, placement in enumerate(p.placements):
            if not isinstance(placement, Replicate):
                dist.all_reduce(value, op, group=p.device_mesh.get_group(dim))
    return value
