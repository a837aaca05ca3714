"""a * b + c with one rounding, for compiled code: torch's CPU kernels use it, so code of equal bits must too."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compat import fused_multiply_add

_fma = fused_multiply_add()


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fma(a, b, c) of float32 tensors that broadcast.

    Without the private operator it goes by float64, where the product is exact: then the sum is rounded twice, which
    differs in about one case in 2^29, by one unit in the last place.
    """
    if _fma is not None and torch.compiler.is_compiling():
        return _fma(a, b, c)
    return (a.double() * b.double() + c.double()).to(torch.float32)
