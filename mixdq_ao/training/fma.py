"""a * b + c with one rounding, for compiled code: torch's CPU kernels use it, so code of equal bits must too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    # Registers torch.ops.prims.fma; private, and without a public name so far.
    from torch._inductor import inductor_prims

    _fma: Any = inductor_prims.fma
except (ImportError, AttributeError):
    _fma = None


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fma(a, b, c) of float32 tensors that broadcast.

    Without the private operator it goes by float64, where the product is exact: then the sum is rounded twice, which
    differs in about one case in 2^29, by one unit in the last place.
    """
    if _fma is not None and torch.compiler.is_compiling():
        return _fma(a, b, c)
    return (a.double() * b.double() + c.double()).to(torch.float32)
