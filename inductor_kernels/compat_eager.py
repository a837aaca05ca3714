"""The private names of torch that eager mode uses, in one place; torch 2.11, 2.13 and 2.15 all have them.

:mod:`inductor_kernels.compat` has those of code generation. It imports Inductor, which takes seconds; this module
imports nothing that ``import torch`` has not loaded already.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "flash_attention",
    "has_int8_dot_products",
    "int_mm",
    "is_traceable_wrapper_subclass",
    "unset_fake_temporarily",
    "version",
]


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N]: the product of two int8 matrices [M, K] and [K, N]."""
    return torch._int_mm(a, b)


def version(tensor: Tensor) -> int:
    """A counter that every change in place raises; -1 for inference tensors, which have none."""
    return -1 if tensor.is_inference() else tensor._version


def has_int8_dot_products() -> bool:
    """Whether the CPU has VNNI or AMX, as far as this torch can tell."""
    probes = (getattr(torch.cpu, name, None) for name in ("_is_vnni_supported", "_is_amx_tile_supported"))
    return any(probe is not None and probe() for probe in probes)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    """The operator behind ``scaled_dot_product_attention`` on a GPU where no mask is given."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
