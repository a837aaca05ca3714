"""Splits prompts into batches that draw the same noise as the whole list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..models.pipelines import Sampling


def batches(prompts: list[str], sampling: Sampling) -> Iterator[tuple[list[str], Sampling]]:
    """Batches of the prompts, each with the sampling that draws the same noise as in the whole list."""
    for start in range(0, len(prompts), sampling.batch_size):
        part = prompts[start : start + sampling.batch_size]
        yield part, replace(sampling, seed=sampling.seed + start, batch_size=len(part))
