"""Times one compiled call of each variant's UNet, in alternation."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..models.pipelines import Sampling, generate_all
from ..models.portable import captured_call
from ..plan import Plan
from ..progress import progress
from .measure import rounds_of, speedup
from .quantized import quantized_unet


@torch.no_grad()
def latencies(
    pipe: Any, plans: Mapping[str, Plan], prompts: list[str], *, least: int = 0, deadline: float = math.inf
) -> dict[str, dict[str, float]]:
    """Milliseconds of one compiled UNet call with ``prompts`` as one batch, and the ratio to compiled fp32.

    The first ``least`` plans are always compiled. The others are compiled in order, as long as a compilation as slow as
    the slowest so far would end before ``deadline`` (in ``time.monotonic()``); the rest is missing from the result.
    """
    inputs = unet_inputs(pipe, prompts)
    calls: dict[str, Callable[[], object]] = {}
    slowest = 0.0
    with progress("compiling", len(plans) + 1) as bar:
        for name, plan in {"fp32": None, **plans}.items():
            start = time.monotonic()
            if len(calls) > least and start + slowest > deadline:
                break
            unet = copy.deepcopy(pipe.unet) if plan is None else quantized_unet(pipe.unet, plan)
            torch.compiler.reset()
            compiled = torch.compile(unet, fullgraph=True)
            compiled(**inputs)
            calls[name] = lambda compiled=compiled: compiled(**inputs)
            slowest = max(slowest, time.monotonic() - start)
            bar.advance(note=name)
    times = rounds_of(calls, rounds=25)
    return {n: {"latency_ms": statistics.median(t), "speedup": speedup(times["fp32"], t)} for n, t in times.items()}


def unet_inputs(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """The arguments of the UNet's call in the first step of a generation, by name."""
    sampling = Sampling(batch_size=len(prompts))
    return captured_call(pipe.unet, lambda: generate_all(pipe, prompts, sampling, "latent"))
