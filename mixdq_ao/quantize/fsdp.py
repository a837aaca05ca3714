"""FSDP2: ``fully_shard`` divides packed weights by output rows and gathers them, still packed, for the moment of use.

    fully_shard(model, ignored_params=undivided(model, world_size))

What has a row per output (codes, scales, zero points, BOS outputs) is divided and gathered; activation parameters and
the BOS embedding are a few bytes and stay whole in every process. Rows must divide evenly, as FSDP2 asks of tensors
that gather themselves; weights that do not, and split ones, are ``undivided``.
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
    """A weight of as many rows as asked for, everything else as in this one: what FSDP2 copies its part into."""
    weight, size = args[:2]
    if tuple(size[1:]) != tuple(weight.shape[1:]):
        raise NotImplementedError(f"new_zeros({tuple(size)}) of {weight}: expected another number of rows only")
    return weight.with_tensors(**{n: t.new_zeros((size[0], *t.shape[1:])) for n, t in weight.by_row().items()})


@MixDQTensor.implements(aten.view.default)
def _(func, types, args, kwargs):
    """FSDP2 keeps a flat view of what it divides; here it is the weight itself, which gathers its own tensors."""
    weight, size = args[:2]
    if list(size) not in ([-1], [weight.numel()], list(weight.shape)):
        raise NotImplementedError(f"view({tuple(size)}) of {weight}: a packed weight has one shape")
    return weight.with_tensors()


@MixDQTensor.implements(aten.view_as.default)
def _(func, types, args, kwargs):
    """Inference mode does not take this apart into the above."""
    return args[0].view(args[1].shape)


@MixDQTensor.implements(aten.as_strided.default)
def _(func, types, args, kwargs):
    weight, size, stride = args[:3]
    if list(size) != list(weight.shape) or list(stride) != list(weight.stride()):
        raise NotImplementedError(f"as_strided({tuple(size)}) of {weight}: a packed weight has one shape")
    return return_and_correct_aliasing(func, args, kwargs, weight.with_tensors())


def _pre_all_gather(self: MixDQTensor, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
    """What is gathered, and what the other side needs to know."""
    rows = self.by_row()
    return tuple(rows.values()), (list(rows), self)


def _post_all_gather(
    self: MixDQTensor, gathered: tuple[Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Any = None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """The whole weight of the gathered tensors, which it holds and FSDP2 frees after use.

    A group of one process has nothing to gather: FSDP2 hands over a copy of the first tensor alone, and the others are
    whole as they are.
    """
    if out is not None:
        return None  # it holds these very tensors, which have just been filled again
    names, part = metadata
    rows = dict(zip(names, gathered, strict=False))
    rows |= {name: getattr(part, name).to(gathered[0].device) for name in names if name not in rows}
    return part.with_tensors(**rows), gathered


for name, hook in (("fsdp_pre_all_gather", _pre_all_gather), ("fsdp_post_all_gather", _post_all_gather)):
    setattr(MixDQTensor, name, hook)
