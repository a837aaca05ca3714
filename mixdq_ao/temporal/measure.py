"""Measures the error of a schedule: runs whole generations and compares them with full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ScheduleError
from ..models.pipelines import Sampling, check_prompts, denoiser, generate_all
from ..search.batches import batches
from ..search.metrics import ssim
from .runtime import LevelRuntime

Metric = Callable[[Tensor, Tensor], float]
MetricName = Literal["ssim", "mse"]
Output = Literal["latent", "pt"]
BUDGET = 1 << 30


def one_minus_ssim(images: Tensor, reference: Tensor) -> float:
    """1 - mean SSIM of pictures [B, 3, H, W] in [0, 1]."""
    return 1.0 - ssim(images, reference).mean().item()


def latent_mse(latents: Tensor, reference: Tensor) -> float:
    """Mean squared error of final latents."""
    return (latents.double() - reference.double()).square().mean().item()


METRICS: dict[MetricName, tuple[Metric, Output]] = {"ssim": (one_minus_ssim, "pt"), "mse": (latent_mse, "latent")}


class GenerationError:
    """``error(schedule)`` for ``search_schedule``: generates with a prepared model and compares with the reference.

    The output of a denoising step depends only on the levels up to that step, so it is cached by them: a search
    computes about half of its steps. This needs a deterministic pipeline (``generate`` gives every prompt a generator
    of its own).

    Attributes:
        reference: pictures or latents in full precision, from ``draw_reference`` before the model was prepared.
        metric: "ssim" (1 - SSIM of pictures), "mse" (of latents), or any function of pictures and reference, both
            [B, 3, H, W] in [0, 1], such as LPIPS.
        computed, reused: number of denoising calls that were computed and that came from the cache.
        budget: bytes of outputs that may still be cached.
    """

    def __init__(
        self,
        pipe: Any,
        runtime: LevelRuntime,
        prompts: Sequence[str],
        sampling: Sampling,
        reference: Tensor,
        *,
        metric: MetricName | Metric = "ssim",
        budget: int = BUDGET,
    ) -> None:
        self.pipe, self.runtime, self.sampling = pipe, runtime, sampling
        self.prompts, self.reference = check_prompts(prompts), reference
        found = _measure(metric)
        self.metric: Metric = found[0]
        self.output: Output = found[1]
        self.budget = budget
        self.computed = self.reused = 0
        self._kept: dict[tuple[object, ...], Any] = {}

    def __call__(self, schedule: tuple[str, ...]) -> float:
        return self.metric(self.draw(schedule), self.reference)

    def draw(self, schedule: tuple[str, ...], output: Output | None = None) -> Tensor:
        """Generates pictures or latents (default: whichever the metric compares) with a schedule. The runtime follows
        the pipeline from then on."""
        self.runtime.plan = self.runtime.plan.with_steps(schedule)
        self.runtime.follow(self.pipe)
        drawn = []
        for index, (prompts, sampling) in enumerate(batches(self.prompts, self.sampling)):
            with self._reusing(index):
                drawn.append(generate_all(self.pipe, prompts, sampling, output or self.output))
        return torch.cat(drawn)

    @contextmanager
    def _reusing(self, batch: int) -> Iterator[None]:
        module, levels = denoiser(self.pipe), []
        own, compute = module.__dict__.get("forward"), module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            levels.append(self.runtime.level)
            key = (batch, *levels)
            if key in self._kept:
                self.reused += 1
                return self._kept[key]
            self.computed += 1
            output = compute(*args, **kwargs)
            self._keep(key, output)
            return output

        module.forward = forward
        try:
            yield
        finally:
            del module.forward
            if own is not None:
                module.forward = own

    def _keep(self, key: tuple[object, ...], output: Any) -> None:
        size = sum(t.numel() * t.element_size() for t in output if isinstance(t, Tensor))
        if size <= self.budget and isinstance(output, tuple):
            self.budget -= size
            self._kept[key] = output


def draw_reference(
    pipe: Any, prompts: Sequence[str], sampling: Sampling, *, metric: MetricName | Metric = "ssim"
) -> Tensor:
    """The reference of ``GenerationError``: the same prompts and noise in full precision, before ``prepare``."""
    return generate_all(pipe, check_prompts(prompts), sampling, _measure(metric)[1])


def _measure(metric: MetricName | Metric) -> tuple[Metric, Output]:
    """The function of a metric and the output it compares. Raises ScheduleError for an unknown name."""
    if callable(metric):
        return metric, "pt"
    if metric not in METRICS:
        raise ScheduleError(f"metric is {metric!r}, expected {', '.join(METRICS)}, or a function of two pictures")
    return METRICS[metric]
