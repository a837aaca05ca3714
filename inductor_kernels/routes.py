"""Which kernel multiplies codes by a weight on a CPU.

    onednn-int8   VNNI or AMX, or weights so small that a pair of products fits 16 bits (all 2 and 4 bit ones)
    avx2          everything else, and products too small to repay oneDNN's cost per call: a C kernel that multiplies
                  16-bit pairs, built once where there is a compiler (:mod:`inductor_kernels.avx2`)
    float32       the same on integer codes, where there is none; also grouped convolutions
                  that oneDNN does not take

All are exact, float32 while sums stay below 2^24 (from 520 inputs on they may not: then to its rounding). Measured on
two cores of an AMD EPYC, times the speed of float32. Zen 3, no VNNI: linear layers of ten million multiplications and
more 1.4-2.0 (avx2) and 1.1-2.6 (onednn-int8), 3x3 convolutions 1.1-1.9 and 1.3-1.8. Zen 5, VNNI with AVX-512
(onednn-int8): linear layers 6.1-8.2, twice what it would be if MKL did not multiply float32 with AVX2 on such a
processor; 3x3 convolutions 3.1-4.3; 1.6-1.8 tera-operations a second.
"""

import functools
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from . import avx2, onednn, weights

Route = Literal["onednn-int8", "avx2", "float32"]
SMALL = 1 << 21  # products of fewer multiplications run in float32: oneDNN's int8 call costs 50 us before it starts
SMALL_VNNI = 1 << 19  # 20 us there, and the product itself next to nothing
SMALL_AVX2 = 1 << 26  # below, the C kernel is the faster one also where oneDNN is exact


def route(weight_bits: int, weight: Tensor | None = None) -> Route:
    """Which kernel multiplies large products by such weights here.

    weight: an int8 weight, to say it for this one; without it the answer for 8 bit is that of a typical weight.
    """
    if weight_bits not in (2, 4, 8):
        raise ValueError(f"weight_bits={weight_bits!r}: expected 2, 4 or 8")
    exact = weight_bits < 8 or onednn.int8_is_exact() or (weight is not None and _pairs_fit(weight))
    if onednn.available() and exact:
        return "onednn-int8"
    return "avx2" if has_avx2() else "float32"


@functools.cache
def has_avx2() -> bool:
    """Whether the C kernel may multiply; where oneDNN is exact that is the faster one."""
    return not onednn.int8_is_exact() and avx2.available()


def small() -> int:
    """Multiplications below which a product is not worth oneDNN's call."""
    if onednn.int8_is_exact():
        return SMALL_VNNI
    return SMALL_AVX2 if has_avx2() else SMALL


def takes_onednn(multiplications: int, prepared: weights.Prepared, weight: Tensor) -> bool:
    """Whether oneDNN multiplies by this weight in a product of this size."""
    return multiplications >= small() and _exact(prepared, weight)


def _exact(prepared: weights.Prepared, weight: Tensor) -> bool:
    if prepared.exact is None:
        packed = prepared.bits < 8
        look = not packed and not onednn.int8_is_exact() and weights.keeps()  # costs more than it saves if not kept
        prepared.exact = route(prepared.bits, weight if look else None) == "onednn-int8"
    return prepared.exact


def _pairs_fit(w: Tensor) -> bool:
    """Whether 255 times any two weights added up in 16 bits stays in range, so that nothing can saturate.

    A linear layer adds neighbours along K; how a convolution pairs its taps is oneDNN's business, so there the two
    largest weights of a channel must fit.
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
    """Whether products of this size run in oneDNN's int8 kernels here, whatever the weight's values."""
    return multiplications >= small() and route(weight_bits) == "onednn-int8"


def repays_activation(name: str) -> bool:
    """Whether oneDNN computes this function no slower than generated code. Its tanh comes from tables, which AVX-512
    holds in registers; AVX2 gathers them from memory: 5.4 ns per element on an EPYC (Zen 3), where generated code takes
    3.1, or 1.1 as :mod:`inductor_kernels.gelu` writes it. On a Zen 5 linear, tanh GELU, quantize, linear is 1.01-1.09
    times as fast by oneDNN."""
    return name != "gelu_tanh" or onednn.avx512()
