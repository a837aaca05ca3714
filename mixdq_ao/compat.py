"""What the library needs of torch that torch does not document, in one place; torch 2.11, 2.13 and 2.15 all have it.

Code generation has its own: :mod:`inductor_kernels.compat`.
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
"""The collectives that functions of tensors are traced with."""
unhandled_torch_function: Any = torch._C._disabled_torch_function_impl
"""``__torch_function__`` of a subclass that handles operators only; torch's notes on extending it name this."""

CPU_FLAGS = {
    "avx2": "_is_avx2_supported",
    "avx512": "_is_avx512_supported",
    "vnni": "_is_vnni_supported",
    "amx": "_is_amx_tile_supported",
    "bf16": "_is_avx512_bf16_supported",
}
"""What a CPU may have, and who in ``torch.cpu`` says whether this one does."""


def cpu_has(flag: str) -> bool | None:
    """One of ``CPU_FLAGS``; None where this torch cannot say."""
    probe = getattr(torch.cpu, CPU_FLAGS[flag], None)
    return None if probe is None else bool(probe())


@cache
def fused_multiply_add() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """a * b + c with one rounding, for code that is compiled; None where torch has no such operator."""
    try:
        from torch._inductor import inductor_prims

        return inductor_prims.fma
    except (ImportError, AttributeError):
        return None


def without_torch_function() -> AbstractContextManager[None]:
    """Functions called in the block see subclasses of tensors as operators do."""
    return torch._C.DisableTorchFunctionSubclass()


def wrapper(cls: type[Tensor], shape: Sequence[int], **options: Any) -> Any:
    """A tensor of a subclass that has no memory of its own, without a gradient. ``options``: strides, dtype, device."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, requires_grad=False, **options)


def uncompiled(model: Any) -> Any:
    """What ``torch.compile`` wrapped; a model that it did not wrap as it is."""
    return getattr(model, "_orig_mod", model)


def copy_all_(to: list[Tensor], values: Sequence[Tensor]) -> None:
    """Copies each of ``values`` into its place, in few launches."""
    torch._foreach_copy_(to, list(values))


def norms(tensors: list[Tensor]) -> Tensor:
    """[n]: the Euclidean norm of each tensor, in float32, in few launches."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))


def compile_package(program: torch.export.ExportedProgram, path: str) -> None:
    """Writes the AOTInductor package of an exported program. torch documents the function by this name."""
    torch._inductor.aoti_compile_and_package(program, package_path=path)
