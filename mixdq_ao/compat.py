"""Undocumented names of torch that the library uses, in one place; torch 2.11, 2.13 and 2.15 have them all.

Those of the kernels are in :mod:`inductor_kernels.compat` and :mod:`inductor_kernels.compat_eager`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    is_in_torch_dispatch_mode,
    is_traceable_wrapper_subclass,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "CPU_FLAGS",
    "compile_package",
    "copy_all_",
    "cpu_has",
    "fused_multiply_add",
    "functional_collectives",
    "is_in_torch_dispatch_mode",
    "is_traceable_wrapper_subclass",
    "norms",
    "return_and_correct_aliasing",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "uncompiled",
    "unhandled_torch_function",
    "without_torch_function",
    "wrapper",
]

functional_collectives = torch.ops._c10d_functional
"""Namespace of the functional collectives, which traced graphs contain."""
unhandled_torch_function: Any = torch._C._disabled_torch_function_impl
"""``__torch_function__`` of subclasses that override ``__torch_dispatch__`` only, as torch's documentation advises."""

CPU_FLAGS = {
    "avx2": "_is_avx2_supported",
    "avx512": "_is_avx512_supported",
    "vnni": "_is_vnni_supported",
    "amx": "_is_amx_tile_supported",
    "bf16": "_is_avx512_bf16_supported",
}
"""{feature of a CPU: the function of ``torch.cpu`` that detects it}."""


def cpu_has(flag: str) -> bool | None:
    """Whether this CPU has a feature of ``CPU_FLAGS``; None if this torch cannot tell."""
    probe = getattr(torch.cpu, CPU_FLAGS[flag], None)
    return None if probe is None else bool(probe())


@cache
def fused_multiply_add() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The operator a * b + c with one rounding, for compiled code; None if torch has none."""
    try:
        from torch._inductor import inductor_prims

        return inductor_prims.fma
    except (ImportError, AttributeError):
        return None


def without_torch_function() -> AbstractContextManager[None]:
    """Disables ``__torch_function__`` in the block; operators still reach ``__torch_dispatch__``."""
    return torch._C.DisableTorchFunctionSubclass()


def wrapper(cls: type[Tensor], shape: Sequence[int], **options: Any) -> Any:
    """A tensor of subclass ``cls`` without storage or gradient. ``options``: strides, dtype, device."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, requires_grad=False, **options)


def uncompiled(model: Any) -> Any:
    """The module inside the wrapper of ``torch.compile``; any other model unchanged."""
    return getattr(model, "_orig_mod", model)


def copy_all_(to: list[Tensor], values: Sequence[Tensor]) -> None:
    """Copies each of ``values`` into the tensor of ``to`` at the same index, in few kernel launches."""
    torch._foreach_copy_(to, list(values))


def norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor: float32 [n], in few kernel launches."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))


def compile_package(program: torch.export.ExportedProgram, path: str) -> None:
    """Writes the AOTInductor package of an exported program, by the function that torch's documentation names."""
    torch._inductor.aoti_compile_and_package(program, package_path=path)
