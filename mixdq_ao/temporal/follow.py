"""Finds the step of a schedule that a call of the denoiser belongs to, from its timestep and the scheduler's list."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ScheduleError

CLOSE = 2.0**-6
"""Relative difference up to which a timestep matches one of the list; bfloat16 rounds by up to 2^-8."""
EQUAL = 1e-6
"""Relative difference below which float32 timesteps count as equal."""
SCALES = (1.0, 1000.0)
"""Factors from the model's timestep to the scheduler's: some models take it in [0, 1], divided by 1000."""


def step_count(timesteps: Tensor, order: int = 1) -> int:
    """Number of denoising steps of a scheduler whose ``timesteps`` are set and which calls the model ``order`` times a
    step.

    The calls of one step repeat its timestep (Heun, PNDM), or use one between two steps (KDPM2).
    """
    distinct = len(torch.unique_consecutive(timesteps))
    return distinct if order == 1 or distinct * 2 <= len(timesteps) + 1 else math.ceil(len(timesteps) / order)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a scheduler says it is.

    Attributes:
        index: of the coming step in its ``timesteps``. Schedulers of diffusers learn it at their first step of a run,
            unless the pipeline tells them where it begins; None until then, and if they do not count.
        fresh: whether it counts steps and has taken none of this run.
    """

    index: int | None = None
    fresh: bool = False

    @classmethod
    def of(cls, scheduler: Any) -> Position:
        """The position of ``scheduler``."""
        index = getattr(scheduler, "step_index", None)
        fresh = hasattr(scheduler, "step_index") and index is None
        return cls(getattr(scheduler, "begin_index", None) if index is None else index, fresh)


class Steps:
    """Finds the steps of one pipeline, whose model is called with its scheduler's timesteps or with these / 1000.

    A timestep of 1 is ambiguous if the list runs from 1000 to 1: it may be the last one, or the first / 1000. The scale
    of the first unambiguous call is remembered.
    """

    def __init__(self) -> None:
        self.scale: int | None = None

    def step_of(
        self,
        timesteps: Tensor,
        timestep: Tensor | float,
        steps: int,
        order: int = 1,
        position: Position = Position(),  # noqa: B008  (frozen)
    ) -> int:
        """The step, in [0, steps), of a call with ``timestep`` (a number, or a tensor that repeats one).

        Pipelines usually pass an element of ``timesteps`` itself: its storage offset is its index, known without a
        device synchronization. Otherwise the scheduler's ``position`` says it, if known: some models are called with
        another function of the timestep (1 - t / 1000, or an angle). Otherwise the nearest value is searched; a run
        whose first value is near none begins at the first step. A run that begins late (img2img) has its steps at the
        end.

        Raises:
            ScheduleError: the scheduler does not run ``steps`` steps, or ``timestep`` is not in its list.
        """
        place = _place_in_memory(timesteps, timestep)
        if place is None:
            place = position.index
        if place is None or place >= len(timesteps):
            place = self._nearest(timesteps, timestep, position.fresh)
        if len(timesteps) == steps:
            return place
        if step_count(timesteps, order) != steps:
            raise ScheduleError(
                f"the schedule is for {steps} steps, the scheduler runs {step_count(timesteps, order)}; "
                f"use plan.resampled({step_count(timesteps, order)}), or follow(pipe, resample=True)"
            )
        distinct, rank = torch.unique_consecutive(timesteps, return_inverse=True)
        return int(rank[place]) if len(distinct) == steps else place // order

    def _nearest(self, timesteps: Tensor, timestep: Tensor | float, fresh: bool) -> int:
        value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        listed = timesteps.detach().double().cpu()
        distances = torch.stack([(listed - value * s).abs() / listed.abs().clamp(min=1.0) for s in SCALES])
        least, nearest = (found.tolist() for found in distances.min(1))
        close = [scale for scale, distance in enumerate(least) if distance <= CLOSE]
        if not close and fresh:
            return 0
        if not close:
            raise ScheduleError(
                f"timestep {value:g} is none of the scheduler's {len(listed)} ({listed[0]:g} to {listed[-1]:g}); "
                "follow the pipeline that is being called, or set the level yourself"
            )
        if len(close) == 1:
            self.scale = close[0]
        if self.scale in close:
            return nearest[self.scale]
        # both scales match and neither is known: the nearer one; of equally near ones the earlier step, a run's start
        return nearest[min(close, key=lambda scale: (round(least[scale] / EQUAL), nearest[scale]))]


def timesteps_of(scheduler: Any) -> Tensor:
    """``scheduler.timesteps``, one for each step: SCMScheduler (Sana Sprint) lists the end of the last step as well."""
    timesteps = scheduler.timesteps
    return timesteps[:-1] if "SCMScheduler" in (kind.__name__ for kind in type(scheduler).__mro__) else timesteps


def _place_in_memory(timesteps: Tensor, timestep: Tensor | float) -> int | None:
    if not (isinstance(timestep, Tensor) and timestep.dtype == timesteps.dtype):
        return None
    base, here = timesteps.untyped_storage().data_ptr(), timestep.untyped_storage().data_ptr()
    if base != here or timesteps.dim() != 1 or len(timesteps) < 2:
        return None
    place = (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
    return place if 0 <= place < len(timesteps) else None
