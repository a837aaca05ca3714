"""Bytes of a model's tensors, for any quantization library."""

from __future__ import annotations

from torch import Tensor, nn


def model_bytes(model: nn.Module) -> int:
    """Bytes of storage of all parameters and buffers, including inner tensors of subclasses; shared storage once."""
    seen: dict[int, int] = {}

    def visit(tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                visit(getattr(tensor, name))
        else:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    for tensor in (*model.parameters(), *model.buffers()):
        visit(tensor)
    return sum(seen.values())
