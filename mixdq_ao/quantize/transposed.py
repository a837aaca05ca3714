"""``weight.t()`` of a quantized linear weight: stays packed in matrix products, and is dequantized for other operators.

Where torch decomposes ``F.linear``, as for DTensor, it calls ``x @ weight.t()`` or ``addmm(bias, x, weight.t())``. Both
compute the same integer product, with the same quantization of ``x``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat import return_and_correct_aliasing, tree_map_only, unhandled_torch_function, wrapper
from .tensor import MixDQTensor
from .tensor_ops import linear

aten = torch.ops.aten


class TransposedMixDQTensor(Tensor):
    """The transpose [K, N] of a weight [N, K], or [B, K, N] expanded over a batch. Made by ``weight.t()``."""

    weight: MixDQTensor

    @staticmethod
    def __new__(cls, weight: MixDQTensor, batch: tuple[int, ...] = ()):
        rows, columns = weight.shape
        with torch.inference_mode(weight.is_inference()):  # a view is an inference tensor where its base is one
            strides = (*[0] * len(batch), 1, columns)
            return wrapper(cls, (*batch, columns, rows), strides=strides, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight: MixDQTensor, batch: tuple[int, ...] = ()):
        super().__init__()
        self.weight = weight

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, ...]]:
        return ["weight"], tuple(self.shape[:-2])

    @classmethod
    def __tensor_unflatten__(cls, tensors: dict[str, Any], batch: tuple[int, ...], size: Any, stride: Any):
        return cls(tensors["weight"], batch)

    def dequantize(self) -> Tensor:
        """The floating-point values, in the layer's type."""
        return self.weight.dequantize().t().expand(self.shape)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{self.weight!r}.t()" + (f".expand{tuple(self.shape)}" if self.dim() > 2 else "")

    __torch_function__ = unhandled_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func)
        found = NotImplemented if handler is None else handler(func, args, kwargs or {})
        if found is NotImplemented:  # any other operator gets the dequantized values
            args, kwargs = tree_map_only(cls, lambda t: t.dequantize(), (args, kwargs or {}))
            return func(*args, **kwargs)
        return found


def _plain(x: object) -> bool:
    return not isinstance(x, TransposedMixDQTensor | MixDQTensor)


def _product(func: Any, args: Any, kwargs: Any) -> Any:
    """x [..., K] @ [K, N], batched or not; the weight is the same for the whole batch."""
    x, transposed = args[:2]
    batched = isinstance(transposed, TransposedMixDQTensor) and transposed.shape[:-2] in ((), x.shape[:-2])
    return linear(x, transposed.weight) if batched and _plain(x) and not kwargs else NotImplemented


def _added_product(func: Any, args: Any, kwargs: Any) -> Any:
    """bias [N] + x [M, K] @ [K, N], computed as the layer's product."""
    bias, x, transposed = args[:3]
    if kwargs or not _plain(x) or _plain(transposed) or bias.shape != transposed.shape[-1:]:
        return NotImplemented
    return linear(x, transposed.weight, bias)


def _back(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].weight.detach() if args[0].dim() == 2 else NotImplemented


def _same(func: Any, args: Any, kwargs: Any) -> Any:
    if set(kwargs) - {"memory_format"}:
        return NotImplemented
    transposed = args[0]
    found = TransposedMixDQTensor(func(transposed.weight), tuple(transposed.shape[:-2]))
    return return_and_correct_aliasing(func, args, kwargs, found)


def _repeated(func: Any, args: Any, kwargs: Any) -> Any:
    """Expands or reshapes the batch dimensions, as torch does before a batched product."""
    transposed, size = args[0], list(args[1])
    if len(size) < 2 or tuple(size[-2:]) != tuple(transposed.shape[-2:]) or -1 in size:
        return NotImplemented
    return TransposedMixDQTensor(transposed.weight, tuple(size[:-2]))


_HANDLERS: dict[Any, Any] = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.matmul.default: _product,
    aten.addmm.default: _added_product,
    aten.t.default: _back,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.expand.default: _repeated,
    aten.view.default: _repeated,
    aten._unsafe_view.default: _repeated,
    aten.reshape.default: _repeated,
}


@MixDQTensor.implements(aten.t.default)
def _(func, types, args, kwargs):
    weight: MixDQTensor = args[0]
    return TransposedMixDQTensor(weight) if weight.dim() == 2 else func(weight.dequantize())


@MixDQTensor.implements([aten.mm.default, aten.bmm.default])
def _(func, types, args, kwargs):
    """``grad @ weight``, the backward of ``x @ weight.t()``, with the dequantized weight."""
    return func(*(t.dequantize() if isinstance(t, MixDQTensor) else t for t in args))
