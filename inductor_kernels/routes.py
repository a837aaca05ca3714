"""Chooses the kernel that multiplies codes by a weight on a CPU.

    onednn-int8   with VNNI or AMX, or where a weight is so small that a pair of products fits 16 bits (all 2- and 4-bit
                  weights)
    avx2          otherwise, and for products too small to repay oneDNN's cost per call: a C kernel that multiplies
                  16-bit pairs, built once where there is a compiler (:mod:`inductor_kernels.avx2`)
    float32       where there is no compiler, and for grouped convolutions that oneDNN does not take: torch's float32
                  product of integer values

All are exact; float32 is exact while sums stay below 2^24, which more than 520 inputs may exceed, and rounds above.
Speedups over float32, measured on two cores of an AMD EPYC: on Zen 3, without VNNI, linear layers of ten million
multiplications and more 1.4-2.0 (avx2) and 1.1-2.6 (onednn-int8), 3x3 convolutions 1.1-1.9 and 1.3-1.8. On Zen 5, VNNI
with AVX-512 (onednn-int8), linear layers 6.1-8.2, half of which is due to MKL, which multiplies float32 with AVX2 on
this processor; 3x3 convolutions 3.1-4.3; 1.6-1.8 tera-operations per second.
"""

import functools
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from . import avx2, onednn, weights

Route = Literal["onednn-int8", "avx2", "float32"]
# Multiplications below which a product does not run in oneDNN's int8 kernels:
SMALL = 1 << 21  # but in float32: a call of oneDNN costs 50 us before it starts
SMALL_VNNI = 1 << 19  # but in float32: with VNNI the call costs 20 us
SMALL_AVX2 = 1 << 26  # but in the C kernel, which is faster up to here even where oneDNN is exact


def route(weight_bits: int, weight: Tensor | None = None) -> Route:
    """The kernel for large products with weights of ``weight_bits`` on this machine.

    weight: an int8 weight, to answer for this one; without it the answer for 8 bits is that of a typical weight.
    """
    if weight_bits not in (2, 4, 8):
        raise ValueError(f"weight_bits={weight_bits!r}: expected 2, 4 or 8")
    exact = weight_bits < 8 or onednn.int8_is_exact() or (weight is not None and _pairs_fit(weight))
    if onednn.available() and exact:
        return "onednn-int8"
    return "avx2" if has_avx2() else "float32"


@functools.cache
def has_avx2() -> bool:
    """Whether to use the C kernel: it is available and oneDNN, which is faster, is not exact for all weights."""
    return not onednn.int8_is_exact() and avx2.available()


def small() -> int:
    """Multiplications below which a product does not repay a call of oneDNN on this machine."""
    if onednn.int8_is_exact():
        return SMALL_VNNI
    return SMALL_AVX2 if has_avx2() else SMALL


def takes_onednn(multiplications: int, prepared: weights.Prepared, weight: Tensor) -> bool:
    """Whether a product of this size with this weight runs in oneDNN's int8 kernels."""
    return multiplications >= small() and _exact(prepared, weight)


def _exact(prepared: weights.Prepared, weight: Tensor) -> bool:
    if prepared.exact is None:
        packed = prepared.bits < 8
        look = (
            not packed and not onednn.int8_is_exact() and weights.keeps()
        )  # the check costs more than it saves if its result is not kept
        prepared.exact = route(prepared.bits, weight if look else None) == "onednn-int8"
    return prepared.exact


def _pairs_fit(w: Tensor) -> bool:
    """Whether the sum of two products of a code (at most 255) and a weight always fits 16 bits, so that ``vpmaddubsw``
    cannot saturate.

    In a linear layer the pairs are neighbours along K. How oneDNN pairs the taps of a convolution is internal to it, so
    the two largest weights of a channel must fit.
    """
    rows = w.flatten(1).int()
    if rows.shape[1] % 2:
        rows = F.pad(rows, (0, 1))
    for signed in (rows.clamp(min=0), (-rows).clamp(min=0)):
        pairs = signed.unflatten(1, (-1, 2)) if w.ndim == 2 else signed.topk(min(2, signed.shape[1]), 1).values
        if int(pairs.sum(-1).max()) * 255 > 32767:
            return False
    return True


def repays_onednn(multiplications: int, weight_bits: int) -> bool:
    """Whether products of this size run in oneDNN's int8 kernels for all weights of ``weight_bits``."""
    return multiplications >= small() and route(weight_bits) == "onednn-int8"


def repays_activation(name: str) -> bool:
    """Whether oneDNN computes this activation at least as fast as generated code. It takes tanh from tables, which
    AVX-512 holds in registers and AVX2 gathers from memory: 5.4 ns per element on an EPYC (Zen 3), where generated code
    takes 3.1, or 1.1 in the form of :mod:`inductor_kernels.gelu`. On a Zen 5 with oneDNN linear, tanh GELU, quantize,
    linear is 1.01-1.09 times as fast."""
    return name != "gelu_tanh" or onednn.avx512()
