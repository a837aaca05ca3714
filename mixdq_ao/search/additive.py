"""Error powers prepared for summing over layers: monotone in bits, with the measurement's noise floor subtracted."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .sensitivity import Kind, Sensitivity

Errors = dict[str, dict[int, float]]


def additive_errors(sensitivity: Sensitivity, kind: Kind) -> tuple[Errors, tuple[str, ...]]:
    """{layer: {bits: error power}} and the names of the layers whose measurements were repaired.

    A smaller error at fewer bits is noise: error powers are made non-increasing in bits by isotonic regression of their
    logarithms (``pool_decreasing``). Powers at or below the noise floor (1e-12, or the sensitivity's if larger) count
    as equal: the floor, which every measurement contains, is subtracted. At 16 bits the error is 0. Layers without
    measurements are left out.
    """
    errors: Errors = {}
    repaired: list[str] = []
    floor = sensitivity.noise_floor
    for name, layer in sensitivity.layers.items():
        if measured := layer.errors(kind):
            cut = {bits: max(error, floor) for bits, error in measured.items()}
            fitted = pool_decreasing(cut)
            if fitted != cut:
                repaired.append(name)
            errors[name] = {16: 0.0} | {bits: error - floor for bits, error in fitted.items()}
    return errors, tuple(repaired)


def pool_decreasing(errors: Mapping[int, float]) -> dict[int, float]:
    """Positive errors made non-increasing in bits, by pooling adjacent violators (least squares of the logarithms).

    Values that already decrease are returned unchanged; pooled values become their geometric mean.
    """
    pools: list[list[int]] = []
    means: list[float] = []
    for bits in sorted(errors):
        pools.append([bits])
        means.append(math.log(errors[bits]))
        while len(means) > 1 and means[-2] < means[-1]:
            last, mean = pools.pop(), means.pop()
            count = len(pools[-1])
            means[-1] = (means[-1] * count + mean * len(last)) / (count + len(last))
            pools[-1] += last
    return {
        bits: errors[bits] if len(pool) == 1 else math.exp(mean)
        for pool, mean in zip(pools, means, strict=True)
        for bits in pool
    }
