"""``x[...]`` for tensors on a device that this build of torch does not have."""

import torch
from torch import Tensor
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


class Indexing(TorchFunctionMode):
    """Replaces ``Tensor.__getitem__``, which asks for the device's runtime before anything can intercept it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__:
            x, index = args
            return _select(x, index if isinstance(index, tuple) else (index,))
        return func(*args, **(kwargs or {}))
