"""Seconds to a proven optimum as layers and choices grow; the values follow a model's, seeded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mixdq_ao import LayerSensitivity, Sensitivity, allocate

BITS = (2, 4, 8)


def sensitivity(layers: int) -> Sensitivity:
    """Error powers that fall by 4 to 20 a bit, over five decades between layers; sizes as uneven as a UNet's."""
    rng = np.random.default_rng(0)
    found = {}
    for i in range(layers):
        size, power, fall = int(2 ** rng.uniform(8, 22)), 10 ** rng.uniform(-6, -1), rng.uniform(4, 20)
        errors = {bits: power * fall ** -(bits - 2) for bits in BITS}
        found[f"layer{i}"] = LayerSensitivity(
            group="content" if i % 3 else "quality",
            weight_size=size,
            act_size=size // 4,
            weight_scores={b: -10 * float(np.log10(e)) for b, e in errors.items()},
            act_scores={8: 40.0},
            weight_errors=errors,
            act_errors={8: power / 1000},
        )
    return Sensitivity(found)


@pytest.mark.parametrize(
    "layers",
    [pytest.param(175, marks=pytest.mark.quick), pytest.param(794, marks=pytest.mark.quick), 8_000, 33_334],
)
def test_allocate(benchmark: Any, layers: int) -> None:
    """33,334 layers with three choices each are 100,002 binaries."""
    given, budget = sensitivity(layers), 3.5

    def solve():
        return allocate(given, weight_bits=budget, objective="additive", time_limit=300)

    found = benchmark.pedantic(solve, rounds=3 if layers < 1000 else 1)
    benchmark.extra_info.update(binaries=len(BITS) * layers, status=found.status, solver_seconds=found.seconds)
    print(f"\n  {len(BITS) * layers} binaries: {benchmark.stats.stats.median:.2f} s, {found.status}")
    used = sum(found.plan.layers[n].weight_bits * v.weight_size for n, v in given.layers.items())
    assert used <= budget * sum(v.weight_size for v in given.layers.values())
