"""Times contenders in alternation within one process, as ratios with confidence intervals.

A round calls every contender once, so drifts of the machine's speed affect all of them alike. A speed-up is the median
over the rounds of reference time / contender's time within the round, with the 95 % interval of that median from
resampled rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mixdq_ao.app.measure import one_round

RESAMPLES = 2000


def speedup(reference: list[float], times: list[float]) -> dict[str, float]:
    """{"speedup", "low", "high"} of ``times`` against ``reference``, both by round (bootstrap percentiles, seed 0)."""
    ratios = np.asarray(reference) / np.asarray(times)
    picks = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {"speedup": float(np.median(ratios)), "low": float(low), "high": float(high)}


def in_turn(
    benchmark: Any, calls: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Times the calls in alternation; the first is the reference. The results go into the benchmark's extra_info.

    Returns {name: {"ms": median, "speedup", "low", "high"}}.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}

    benchmark.pedantic(one_round, args=(calls, times), rounds=rounds, warmup_rounds=warmup)
    timed = {name: found[-rounds:] for name, found in times.items()}
    reference = next(iter(timed.values()))
    found = {n: {"ms": float(np.median(t))} | speedup(reference, t) for n, t in timed.items()}
    benchmark.extra_info["contenders"] = found
    print()
    for name, row in found.items():
        print(f"  {name:28} {row['ms']:10.3f} ms {row['speedup']:6.2f}x [{row['low']:.2f}, {row['high']:.2f}]")
    return found
