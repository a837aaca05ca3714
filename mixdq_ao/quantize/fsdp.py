"""FSDP2 support: ``fully_shard`` shards packed weights by output rows and all-gathers them, still packed, before use.

    fully_shard(model, ignored_params=undivided(model, world_size))

Tensors with a row per output (codes, scales, zero points, BOS outputs) are sharded and gathered; activation parameters
and the BOS embedding are a few bytes and replicated. Rows must divide evenly, as FSDP2 requires of tensors with
all-gather hooks; ``undivided`` returns the weights whose rows do not, and split ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compat import return_and_correct_aliasing
from .tensor import MixDQTensor, SplitMixDQTensor

aten = torch.ops.aten


def undivided(model: nn.Module, world_size: int) -> set[nn.Parameter]:
    """The parameters that ``fully_shard`` cannot divide over ``world_size`` processes, for ``ignored_params``."""
    quantized = [p for p in model.parameters() if isinstance(p, MixDQTensor | SplitMixDQTensor)]
    return {p for p in quantized if isinstance(p, SplitMixDQTensor) or p.shape[0] % world_size}


@MixDQTensor.implements(aten.new_zeros.default)
def _(func, types, args, kwargs):
    """A weight of zeros that differs in the number of rows only; FSDP2 copies its shard into it."""
    weight, size = args[:2]
    if tuple(size[1:]) != tuple(weight.shape[1:]):
        raise NotImplementedError(f"new_zeros({tuple(size)}) of {weight}: expected another number of rows only")
    return weight.with_tensors(**{n: t.new_zeros((size[0], *t.shape[1:])) for n, t in weight.by_row().items()})


@MixDQTensor.implements(aten.view.default)
def _(func, types, args, kwargs):
    """FSDP2 keeps a flat view of each shard; here that is the weight itself, which gathers its own tensors."""
    weight, size = args[:2]
    if list(size) not in ([-1], [weight.numel()], list(weight.shape)):
        raise NotImplementedError(f"view({tuple(size)}) of {weight}: a packed weight has one shape")
    return weight.with_tensors()


@MixDQTensor.implements(aten.view_as.default)
def _(func, types, args, kwargs):
    """Inference mode does not decompose this operator into ``view``."""
    return args[0].view(args[1].shape)


@MixDQTensor.implements(aten.as_strided.default)
def _(func, types, args, kwargs):
    weight, size, stride = args[:3]
    if list(size) != list(weight.shape) or list(stride) != list(weight.stride()):
        raise NotImplementedError(f"as_strided({tuple(size)}) of {weight}: a packed weight has one shape")
    return return_and_correct_aliasing(func, args, kwargs, weight.with_tensors())


def _pre_all_gather(self: MixDQTensor, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
    """FSDP2's hook before the all-gather: (tensors to gather, metadata for ``_post_all_gather``)."""
    rows = self.by_row()
    return tuple(rows.values()), (list(rows), self)


def _post_all_gather(
    self: MixDQTensor, gathered: tuple[Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Any = None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """FSDP2's hook after the all-gather: the whole weight, which holds the gathered tensors until FSDP2 frees them.

    In a group of one process FSDP2 passes a copy of the first tensor only; the others are taken from the shard, which
    is the whole weight.
    """
    if out is not None:
        return None  # ``out`` holds the gathered tensors themselves, which FSDP2 has refilled
    names, part = metadata
    rows = dict(zip(names, gathered, strict=False))
    rows |= {name: getattr(part, name).to(gathered[0].device) for name in names if name not in rows}
    return part.with_tensors(**rows), gathered


for name, hook in (("fsdp_pre_all_gather", _pre_all_gather), ("fsdp_post_all_gather", _post_all_gather)):
    setattr(MixDQTensor, name, hook)
