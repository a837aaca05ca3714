"""Sensitivity analysis as MixDQ does it: one layer, one bit width at a time, everything else in full precision."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Literal, TypedDict, Unpack, get_args

from torch import Tensor

from ..errors import MixDQError
from ..layers import GroupRule, group_of
from ..models.pipelines import Sampling, check_prompts
from ..quantize.folds import Folding, fold_, folded_moments, foldings_of, planned_folds
from .analysis import Analysis
from .calibrate import calibrate_as_drawn
from .calibration import Calibration
from .distributed import RayWorkers
from .one_at_a_time import OneAtATime
from .part import WHOLE, Part
from .probe import Probing
from .roundings import PLAIN, check_roundings
from .sensitivity import Sensitivity
from .smoothing import as_calibrated
from .watch import denoiser_of

Method = Literal["one_at_a_time", "probe"]
DRAWING = frozenset(f.name for f in fields(Sampling))


class AnalyzeOptions(TypedDict, total=False):
    """Keyword arguments of ``analyze`` that ``analyze_part`` takes as well."""

    method: Method
    calibration: Calibration | None
    steps: int
    weight_bits: Sequence[int]
    act_bits: Sequence[int]
    guidance_scale: float
    seed: int
    batch_size: int
    height: int | None
    width: int | None
    frames: int | None
    rule: GroupRule
    roundings: Sequence[str]
    moments: Mapping[str, Tensor] | None
    replay: bool
    probes: int | None
    precision: float
    budget: int
    workers: RayWorkers | None
    merge: Sequence[str | os.PathLike[str]]


def analyze(
    pipe: Any,
    prompts: Sequence[str],
    *,
    store: str | os.PathLike[str] | None = None,
    method: Method = "one_at_a_time",
    calibration: Calibration | None = None,
    steps: int = 1,
    weight_bits: Sequence[int] = (2, 4, 8),
    act_bits: Sequence[int] = (4, 8),
    guidance_scale: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    rule: GroupRule = group_of,
    roundings: Sequence[str] = (PLAIN,),
    moments: Mapping[str, Tensor] | None = None,
    replay: bool = True,
    probes: int | None = None,
    precision: float = 0.995,
    budget: int = 4 << 30,
    workers: RayWorkers | None = None,
    merge: Sequence[str | os.PathLike[str]] = (),
    part: Part = WHOLE,
) -> Sensitivity:
    """Measures how much each layer suffers from each bit width, by the metric of its group.

    Content layers are judged by the mean SSIM of decoded pictures, quality layers by the SQNR of the denoiser's
    output in dB, both against full precision with the same noise (section 4.2 of arXiv 2405.17873). For every layer
    the relative error power of the denoiser's output is recorded as well.

    Args:
        pipe: a diffusers pipeline in full precision. Compiled models run eagerly meanwhile.
        prompts: texts; 16 to 32 give a stable ranking.
        store: a file that results are appended to after each evaluation; the same call continues from it.
        method: "one_at_a_time", or "probe": estimated to first order from a few backward passes, tens of times
            faster; content layers are then scored by the PSNR of the pictures in dB (see ``Probing``).
        calibration: ranges of the activations; None calibrates on the same prompts and steps. Its smoothing and
            rotation are folded into the weights while this runs, and taken out again.
        steps, guidance_scale, seed, batch_size, height, width, frames: see Sampling.
        rule: layer name -> "content" or "quality".
        roundings: ways to round a weight that are tried at every bit width, as "weight_range rounding" of a LayerPlan
            ("output compensated" is usually the best). For each layer and bit width the one with the least error of the
            denoiser's output is kept, recorded in the sensitivity's ``weight_roundings``, and planned by ``allocate``.
        moments: from ``input_moments``, for roundings that need them. A layer without a moment is not tried with these,
            but with plain rounding where nothing else is offered.
        replay: compute only what follows the changed layer (False: run everything every time).
        probes, precision: of method "probe" (see ``Probing``).
        budget: bytes of intermediate results kept between runs or probes.
        workers: workers of a Ray cluster that evaluations are sent to (see RayWorkers), each with a copy of the
            pipeline; None: one after the other in this process. The values, and the store, are the same.
        merge: stores of the same call on other machines (``analyze_part``), whose results are copied into ``store``
            first.
        part: see ``analyze_part``.

    Raises:
        SensitivityError: a store cannot be used, a rounding is unknown, workers keep dying, or results of other parts
            are missing. MixDQError: prompts are empty, method is unknown, or probes are given to another method.
    """
    with _prepared(
        pipe, prompts, store=store, part=part, merge=merge, workers=workers,
        method=method, replay=replay, probes=probes, precision=precision, budget=budget,
        calibration=calibration, roundings=roundings, moments=moments,
        weight_bits=weight_bits, act_bits=act_bits, rule=rule,
        steps=steps, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size,
        height=height, width=width, frames=frames,
    ) as chosen:  # fmt: skip
        return chosen.sensitivity()


def analyze_part(
    pipe: Any, prompts: Sequence[str], part: Part, *, store: str | os.PathLike[str], **options: Unpack[AnalyzeOptions]
) -> tuple[int, int]:
    """Computes one of several equal parts of the results that ``analyze(pipe, prompts, **options)`` needs: evaluations
    (layers x bits x kind), or the probes of batches. The machines that work on the parts share nothing.

    Each machine calls this with its part and a store of its own; ``analyze(..., store=..., merge=[the stores])`` then
    merges them and computes what is missing. A part that was stopped continues where it was.

    Returns:
        How many results are in the store, and how many all parts have together.

    Raises:
        SensitivityError: as ``analyze``; or ``method="probe"`` without a number of ``probes``.
    """
    if unknown := set(options) - AnalyzeOptions.__optional_keys__:
        raise TypeError(f"analyze_part() got an unexpected keyword argument {min(unknown)!r}")
    with _prepared(pipe, prompts, store=store, part=part, **options) as chosen:
        return chosen.fill()


@contextmanager
def _prepared(
    pipe: Any,
    prompts: Sequence[str],
    *,
    method: Method = "one_at_a_time",
    replay: bool = True,
    probes: int | None = None,
    precision: float = 0.995,
    calibration: Calibration | None = None,
    roundings: Sequence[str] = (PLAIN,),
    moments: Mapping[str, Tensor] | None = None,
    workers: RayWorkers | None = None,
    merge: Sequence[str | os.PathLike[str]] = (),
    **others: Any,
) -> Iterator[OneAtATime | Probing]:
    """The chosen method, ready to run; inside the block the model is folded as it was calibrated.

    ``others``: fields of Sampling and of Analysis, whose defaults are those of ``analyze``.
    """
    roundings = check_roundings(roundings)
    if method not in get_args(Method):
        raise MixDQError(f"method is {method!r}, expected 'one_at_a_time' or 'probe'")
    if probes is not None and method != "probe":
        raise MixDQError(f"probes is {probes!r}, but method is {method!r}; probes are of method 'probe'")
    prompts = check_prompts(prompts)
    sampling = Sampling(**{name: value for name, value in others.items() if name in DRAWING})
    given = calibrate_as_drawn(pipe, prompts, sampling) if calibration is None else calibration
    calibration = Calibration.expect(given, "calibration")
    foldings = foldings_of(calibration.layers)
    with as_calibrated(denoiser_of(pipe), calibration) as calibration:
        analysis = Analysis(
            pipe=pipe,
            prompts=prompts,
            sampling=sampling,
            calibration=calibration,
            roundings=roundings,
            moments=None if moments is None else folded_moments(moments, foldings),
            merge=tuple(merge),
            workers=folding_workers(workers, foldings),
            **{name: value for name, value in others.items() if name not in DRAWING},
        )
        yield Probing(analysis, probes, precision) if method == "probe" else OneAtATime(analysis, replay)


def folding_workers(workers: RayWorkers | None, foldings: Mapping[str, Folding]) -> RayWorkers | None:
    """Ray workers whose loaded models carry the same folding as the model in this process."""
    if workers is None or workers.load is None or not any(foldings.values()):
        return workers
    load = workers.load

    def folding() -> Any:
        pipe = load()
        model = denoiser_of(pipe)
        fold_(model, planned_folds(model, foldings))
        return pipe

    return replace(workers, load=folding)
