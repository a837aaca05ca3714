"""Replacements for functions that query the device's runtime before a dispatch mode can intercept them: ``x[...]``,
``x.contiguous()`` and ``scaled_dot_product_attention``. With them, code that uses fake CUDA tensors can be traced by a
build of torch without CUDA."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .compat_eager import flash_attention


def _select(x: Tensor, index: tuple[Any, ...]) -> Tensor:
    """``x[index]`` by dispatched operators; an index may hold integers, slices, None, Ellipsis and tensors."""
    if not any(part is Ellipsis for part in index):
        index = (*index, Ellipsis)
    dim, tensors = 0, {}
    for position, part in enumerate(index):
        if part is Ellipsis:
            dim = x.ndim - sum(later is not None for later in index[position + 1 :])
        elif part is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            x, dim = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1), dim + 1
        elif isinstance(part, Tensor):
            tensors[dim] = part
            dim += 1
        else:
            x = x.select(dim, part)
    return torch.ops.aten.index.Tensor(x, [tensors.get(d) for d in range(max(tensors) + 1)]) if tensors else x


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    if x.is_contiguous(memory_format=memory_format):
        return x
    return torch.ops.aten.clone.default(x, memory_format=memory_format)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The flash kernel where a GPU would choose it: 16-bit types, no mask, heads of at most 256."""
    flash = query.dtype.itemsize == 2 and attn_mask is None and not enable_gqa and query.shape[-1] <= 256
    if not flash or not query.is_cuda:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return flash_attention(query, key, value, dropout_p, is_causal, scale)


class Methods(TorchFunctionMode):
    """Calls the replacements instead of the functions."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if func is Tensor.__getitem__:
            x, index = args
            return _select(x, index if isinstance(index, tuple) else (index,))
        if func is Tensor.contiguous:
            return _contiguous(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
