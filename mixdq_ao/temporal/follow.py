"""Which step of a schedule a call of the denoiser belongs to, told from its timestep and the scheduler's list."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ScheduleError

CLOSE = 2.0**-6
"""Relative; a timestep in a 16-bit type is off by up to 2^-8."""
EQUAL = 1e-6
"""Relative; float32 timesteps that differ by less are one."""
SCALES = (1.0, 1000.0)
"""Some models are called with the timestep in [0, 1], a thousandth of the scheduler's."""


def step_count(timesteps: Tensor, order: int = 1) -> int:
    """Denoising steps of a scheduler whose ``timesteps`` are set, and whose steps take ``order`` calls.

    Calls of one step repeat its timestep (Heun, PNDM), or stand between two (KDPM2).
    """
    distinct = len(torch.unique_consecutive(timesteps))
    return distinct if order == 1 or distinct * 2 <= len(timesteps) + 1 else math.ceil(len(timesteps) / order)


class Steps:
    """Tells the steps of one pipeline, whose model is called with its scheduler's timesteps or thousandths of them.

    A list from 1000 down to 1 has both ends in either scale. Once a call has told which it is, it is known.
    """

    def __init__(self) -> None:
        self.scale: int | None = None

    def step_of(self, timesteps: Tensor, timestep: Tensor | float, steps: int, order: int = 1) -> int:
        """The step, in [0, steps), of a call with ``timestep`` (a number, or a tensor that repeats one).

        Pipelines hand over an element of ``timesteps`` itself, so its place in memory tells which, without waiting for
        a device; otherwise the nearest value is looked for. A run that begins late (img2img) has its steps at the end.

        Raises:
            ScheduleError: the scheduler does not run ``steps`` steps, or the timestep is none of its own.
        """
        place = _place_in_memory(timesteps, timestep)
        place = self._nearest(timesteps, timestep) if place is None else place
        if len(timesteps) == steps:
            return place
        if step_count(timesteps, order) != steps:
            raise ScheduleError(
                f"the schedule is for {steps} steps, the scheduler runs {step_count(timesteps, order)}; "
                f"use plan.resampled({step_count(timesteps, order)}), or follow(pipe, resample=True)"
            )
        distinct, rank = torch.unique_consecutive(timesteps, return_inverse=True)
        return int(rank[place]) if len(distinct) == steps else place // order

    def _nearest(self, timesteps: Tensor, timestep: Tensor | float) -> int:
        value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        listed = timesteps.detach().double().cpu()
        distances = torch.stack([(listed - value * s).abs() / listed.abs().clamp(min=1.0) for s in SCALES])
        least, nearest = (found.tolist() for found in distances.min(1))
        close = [scale for scale, distance in enumerate(least) if distance <= CLOSE]
        if not close:
            raise ScheduleError(
                f"timestep {value:g} is none of the scheduler's {len(listed)} ({listed[0]:g} to {listed[-1]:g}); "
                "follow the pipeline that is being called, or set the level yourself"
            )
        if len(close) == 1:
            self.scale = close[0]
        if self.scale in close:
            return nearest[self.scale]
        # of equally near ones the earlier: a run begins there
        return nearest[min(close, key=lambda scale: (round(least[scale] / EQUAL), nearest[scale]))]


def _place_in_memory(timesteps: Tensor, timestep: Tensor | float) -> int | None:
    if not (isinstance(timestep, Tensor) and timestep.dtype == timesteps.dtype):
        return None
    base, here = timesteps.untyped_storage().data_ptr(), timestep.untyped_storage().data_ptr()
    if base != here or timesteps.dim() != 1 or len(timesteps) < 2:
        return None
    place = (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
    return place if 0 <= place < len(timesteps) else None
