"""Chooses the final plan by the pictures it draws, over many prompts and several seeds.

Allocation programs leave open how a budget is divided between content and quality layers, and which of several
objectives is the right one for a model. Here every candidate draws the same pictures as full precision does, and the
closest one wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from ..errors import AllocationError
from ..models.pipelines import Sampling, check_prompts, each_frame, generate
from ..plan import Plan
from ..progress import progress
from .allocate import sweep
from .allocation import Allocation
from .calibration import Calibration
from .metrics import WINDOW, psnr, ssim
from .objectives import OBJECTIVES
from .pareto import undominated
from .prediction import faked
from .request import AllocationOptions, Budget
from .sensitivity import Sensitivity
from .watch import denoiser_of, eager


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A candidate, and how close its pictures are to those of full precision.

    Attributes:
        objective: the objective it was solved for.
        allocation: the candidate's figures. plan: its plan, with activation ranges.
        psnr: dB, mean over pictures; error: standard error of that mean.
        ssim: mean over pictures; None where pictures are smaller than the window of SSIM.
        pictures: number of pictures, prompts times seeds (times frames).
    """

    objective: str
    allocation: Allocation
    plan: Plan
    psnr: float
    error: float
    ssim: float | None
    pictures: int


def candidates(
    sensitivity: Sensitivity,
    *,
    weight_bits: Budget,
    act_bits: Budget | None = None,
    objectives: Sequence[str] = OBJECTIVES,
    most: int = 12,
    **options: Unpack[AllocationOptions],
) -> list[tuple[str, Allocation]]:
    """At most ``most`` pairs (objective, allocation), taken in turn from each objective: its splits of the budget that
    no other beats in bytes and predicted error, equal plans once.

    ``options``: as for ``allocate``. Raises AllocationError where no objective has a plan within the budget.
    """
    found: list[list[tuple[str, Allocation]]] = []
    reason: AllocationError | None = None
    for objective in objectives:
        try:
            swept = sweep(sensitivity, weight_bits=weight_bits, act_bits=act_bits, objective=objective, **options)
        except AllocationError as e:
            reason = e
            continue
        found.append([(objective, a) for a in sorted(undominated(swept), key=_predicted)])
    if not found:
        raise reason or AllocationError("objectives: expected at least one")
    kept: list[tuple[str, Allocation]] = []
    for place in range(max(map(len, found))):
        for own in found:
            if place < len(own) and all(own[place][1].plan.layers != a.plan.layers for _, a in kept):
                kept.append(own[place])
    return kept[:most]


def _predicted(allocation: Allocation) -> float:
    return math.inf if allocation.predicted_error is None else allocation.predicted_error


@torch.no_grad()
@eager()
def choose(
    pipe: Any,
    given: Sequence[tuple[str, Allocation]],
    prompts: Sequence[str],
    *,
    calibration: Calibration,
    sampling: Sampling | None = None,
    seeds: int = 1,
    moments: Mapping[str, Tensor] | None = None,
) -> list[Judged]:
    """All candidates with the closeness of their pictures, the best (highest mean PSNR) first.

    Every candidate and full precision draw the same prompts from the same noise, in ``seeds`` rounds of different noise
    (round r starts from ``sampling.seed`` + r times the number of prompts). Candidates run in fake mode, in place: the
    model is never copied, and back in full precision afterwards.
    """
    prompts, sampling = check_prompts(prompts), sampling or Sampling()
    if seeds < 1 or not given:
        raise AllocationError(f"seeds is {seeds} and there are {len(given)} candidates, expected at least 1 of both")
    rounds = [replace(sampling, seed=sampling.seed + r * len(prompts)) for r in range(seeds)]
    judged = []
    with progress("judging plans", 1 + len(given)) as bar:
        references = [list(generate(pipe, prompts, drawn)) for drawn in rounds]
        bar.advance(note="full precision")
        for objective, allocation in given:
            plan = allocation.plan.with_calibration(calibration)
            with faked(denoiser_of(pipe), plan, moments):
                closeness = [_close(generate(pipe, prompts, d), r) for d, r in zip(rounds, references, strict=True)]
            decibel, similarity = (torch.cat(parts) for parts in zip(*closeness, strict=True))
            judged.append(_judged(objective, allocation, plan, decibel, similarity))
            bar.advance(note=f"{objective}, {judged[-1].psnr:.1f} dB")
    return sorted(judged, key=lambda j: j.psnr, reverse=True)


def _close(drawn: Any, references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """PSNR and SSIM of every picture; SSIM is empty where pictures are smaller than its window."""
    pairs = [(each_frame(a), each_frame(b)) for a, b in zip(drawn, references, strict=True)]
    small = min(pairs[0][0].shape[-2:]) < WINDOW
    return torch.cat([psnr(*p) for p in pairs]), torch.empty(0) if small else torch.cat([ssim(*p) for p in pairs])


def _judged(objective: str, allocation: Allocation, plan: Plan, decibel: Tensor, similarity: Tensor) -> Judged:
    mean, pictures = decibel.mean().item(), len(decibel)
    error = decibel.std().item() / math.sqrt(pictures) if pictures > 1 else math.nan
    metadata = {**plan.metadata, "measured_psnr": mean, "measured_pictures": pictures}
    return Judged(
        objective=objective,
        allocation=allocation,
        plan=replace(plan, metadata=metadata),
        psnr=mean,
        error=error,
        ssim=similarity.mean().item() if len(similarity) else None,
        pictures=pictures,
    )
