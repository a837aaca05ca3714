"""DTensor support: quantized weights as local shards of ``torch.distributed.tensor`` tensors, packed in every process.

    parallelize_module(model, mesh, {"to_q": ColwiseParallel(), "to_out.0": RowwiseParallel()})

``distribute_tensor`` sends the shards from one process to the others, ``full_tensor`` gathers them. The collectives
transfer the stored tensors: codes, scales, zero points, BOS outputs, and also the activation parameters and the BOS
embedding, so that all processes quantize their part of an input alike. Weights with BOS outputs can be sharded by rows
only (``ColwiseParallel``), and dimensions must divide evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inductor_kernels.packing import pack

from ..compat import functional_collectives
from .join import difference, joined
from .tensor import MixDQTensor, SplitMixDQTensor

aten, c10d, functional = torch.ops.aten, torch.ops.c10d, functional_collectives


@MixDQTensor.implements(aten.empty_like.default)
def _(func, types, args, kwargs):
    weight = args[0]
    return weight.with_tensors(**{name: func(t, **kwargs) for name, t in weight.by_row().items()})


@SplitMixDQTensor.implements(aten.empty_like.default)
def _(func, types, args, kwargs):
    first, second = (func(half, **kwargs) for half in (args[0].first, args[0].second))
    return SplitMixDQTensor(first, second, args[0].dtype)


@MixDQTensor.implements(aten.constant_pad_nd.default)
def _(func, types, args, kwargs):
    raise NotImplementedError(
        f"padding {args[0]}: a quantized weight is divided evenly; choose a number of processes that divides its "
        "shape, or leave the layer out of the parallel plan"
    )


@MixDQTensor.implements(c10d.scatter_.default)
def _(func, types, args, kwargs):
    """Scatters each stored tensor separately; only the process ``root`` passes ``sources``."""
    (weight,), sources, rest = args[0], args[1], args[2:]
    parts: Sequence[MixDQTensor] = sources[0] if sources else ()

    def scatter(name: str, into: Tensor) -> Any:
        given = [[getattr(part, name).contiguous() for part in parts]] if sources else []
        return func([into], given, *rest, **kwargs)[1]

    return [weight], received(weight, scatter)


@MixDQTensor.implements(c10d.broadcast_.default)
def _(func, types, args, kwargs):
    (weight,), rest = args[0], args[1:]
    return [weight], received(weight, lambda name, into: func([into], *rest, **kwargs)[1])


def received(weight: MixDQTensor, receive: Callable[[str, Tensor], Any]) -> Any:
    """Fills the tensors of ``weight`` by ``receive(name, tensor)``; waits for all works and returns the last.

    ``shared_tensors`` are received into new tensors, since other weights hold the old ones too.
    """
    work, fresh = None, {}
    for name, tensor in weight.stored_tensors().items():
        into = tensor.clone() if name in weight.shared_tensors else tensor.contiguous()
        work = receive(name, into)
        work.wait()
        if name in weight.shared_tensors:
            fresh[name] = into
            continue
        if into is not tensor:
            tensor.copy_(into)
        # A collective does not increment the version counter, by which prepared forms of the old weight are dropped.
        torch.autograd.graph.increment_version(tensor)
    filled = weight.with_tensors(**fresh)
    for name in fresh:
        setattr(weight, name, getattr(filled, name))
    weight.take_shared_key(filled)
    return work


@MixDQTensor.implements(functional.all_gather_into_tensor.default)
def _(func, types, args, kwargs):
    """The shards of all processes concatenated along rows. Waits for the result."""
    weight, rest = args[0], args[1:]

    def gather(tensor: Tensor) -> Tensor:
        return functional.wait_tensor(func(tensor.contiguous(), *rest, **kwargs))

    return weight.with_tensors(**{name: gather(t) for name, t in weight.by_row().items()})


ARRIVED = [
    getattr(functional, name).default for name in ("wait_tensor", "_wrap_tensor_autograd") if hasattr(functional, name)
]


@MixDQTensor.implements(ARRIVED)
def _(func, types, args, kwargs):
    return args[0]


@MixDQTensor.implements(aten.cat.default)
def _(func, types, args, kwargs):
    """Along rows each weight keeps its scales; along columns all must have the same scales."""
    call: tuple[Any, ...] = (*args, *kwargs.values(), 0)
    weights, dim = call[:2]
    if not all(isinstance(weight, MixDQTensor) for weight in weights) or dim % weights[0].dim() > 1:
        raise NotImplementedError(
            f"cat of {weights} along dimension {dim}: expected quantized weights, dimension 0 or 1"
        )
    return joined(weights) if dim % weights[0].dim() == 0 else beside(weights)


def beside(weights: Sequence[MixDQTensor]) -> MixDQTensor:
    """One weight [N, sum K_i, ...] from slices [N, K_i, ...] of its input features.

    Raises:
        NotImplementedError: their precision, scales or zero points differ.
    """
    first = weights[0]
    for weight in weights[1:]:
        same = ("scale", "weight_zero_point")
        held = all(a is b or torch.equal(a, b) for a, b in ((getattr(w, n) for w in (first, weight)) for n in same))
        if not held or difference(first, weight):
            raise NotImplementedError(
                f"cat of {first} and {weight} along dimension 1: they are not parts of one weight"
            )
    codes = torch.cat([weight.codes() for weight in weights], -1)
    tensors: dict[str, Tensor] = {"qdata": codes if first.bits == 8 else pack(codes, first.bits)}
    if first.weight_sum is not None:
        tensors["weight_sum"] = torch.stack([w.weight_sum for w in weights if w.weight_sum is not None]).sum(
            0, dtype=torch.int32
        )
    return first.with_tensors(length=codes.shape[-1], **tensors)
