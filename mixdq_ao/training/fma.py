"""Fused multiply-add for compiled code, which needs it to give the same bits as torch's CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compat import fused_multiply_add

_fma = fused_multiply_add()


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c with one rounding, of float32 tensors that broadcast.

    Without torch's private operator it computes in float64, where the product is exact. The sum is then rounded twice,
    which differs in about one case in 2^29, by one unit in the last place.
    """
    if _fma is not None and torch.compiler.is_compiling():
        return _fma(a, b, c)
    return (a.double() * b.double() + c.double()).to(torch.float32)
