"""What asks for a device's runtime before anything can intercept it, for tensors on a device that this build of torch
does not have: ``x[...]``, ``x.contiguous()``, and the choice of an attention kernel."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def _select(x: Tensor, index: tuple) -> Tensor:
    """Basic indexing by integers, slices, None and Ellipsis, and by tensors, through dispatched operators."""
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


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The flash kernel where a GPU takes it: 16 bits, no mask, heads of at most 256."""
    flash = query.dtype.itemsize == 2 and attn_mask is None and not enable_gqa and query.shape[-1] <= 256
    if not flash or not query.is_cuda:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]


class Methods(TorchFunctionMode):
    """Replaces what would ask for the runtime."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__:
            x, index = args
            return _select(x, index if isinstance(index, tuple) else (index,))
        if func is Tensor.contiguous:
            return _contiguous(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
