"""Sensitivity analysis as MixDQ does it: one layer, one bit width at a time, everything else in full precision."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from ..errors import MixDQError
from ..layers import GroupRule, group_of
from ..models.pipelines import Sampling, check_prompts
from ..quantize.folds import Folding, fold_, folded_moments, foldings_of, planned_folds
from .analysis import Analysis, of_same_model
from .calibrate import calibrate_as_drawn
from .calibration import Calibration
from .distributed import RayWorkers
from .evaluation import Evaluation
from .one_at_a_time import one_at_a_time
from .part import WHOLE, Part, Unfinished
from .probe import probe_sensitivity
from .roundings import PLAIN, check_roundings
from .sensitivity import Sensitivity
from .smoothing import as_calibrated
from .watch import denoiser_of

__all__ = ["Evaluation", "analyze", "analyze_part", "folding_workers", "of_same_model"]


def analyze(
    pipe: Any,
    prompts: Sequence[str],
    *,
    store: str | os.PathLike[str] | None = None,
    method: Literal["one_at_a_time", "probe"] = "one_at_a_time",
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
    """How much each layer suffers from each bit width, judged by its group's metric.

    Content layers are judged by the mean SSIM of decoded pictures, quality layers by the SQNR of the denoiser's
    output in dB, both against full precision with the same noise (section 4.2 of arXiv 2405.17873). For every layer
    the relative error power of the denoiser's output is recorded as well.

    Args:
        pipe: a diffusers pipeline in full precision. What is compiled runs eagerly meanwhile.
        prompts: texts; 16 to 32 give a stable ranking.
        store: a file that results are appended to after each evaluation; the same call continues from it.
        method: "one_at_a_time", or "probe": estimated to first order from a few backward passes, tens of times
            faster; content layers then score in dB of the pictures (see ``probe_sensitivity``).
        calibration: ranges of the activations; calibrated on the same prompts and steps when None. Its smoothing and
            rotation are in the weights while this runs, and taken out again.
        steps, guidance_scale, seed, batch_size, height, width, frames: see Sampling.
        rule: layer name -> "content" or "quality".
        roundings: ways to round a weight that are tried at every bit width, as "weight_range rounding" of a LayerPlan
            ("output compensated" is usually the best). Of each layer and bit width the one with the least error of the
            denoiser's output is kept; the sensitivity says which (``weight_roundings``), and ``allocate`` plans it.
        moments: from ``input_moments``, for roundings that need them; layers they lack go without those, plain if
            nothing else is offered.
        replay: compute only what follows the changed layer (False: run everything every time).
        probes, precision: of method "probe" (see ``probe_sensitivity``).
        budget: bytes of intermediate results kept between runs or probes.
        workers: evaluations go to so many workers of a Ray cluster (see RayWorkers), each with a copy of the pipeline;
            None: one after the other in this process. The values, and the store, are the same.
        merge: other stores of the same call, of other machines (``analyze_part``); their results are taken over into
            ``store`` first.
        part: see ``analyze_part``.

    Raises:
        SensitivityError: a store cannot be used, a rounding is unknown, workers keep dying. MixDQError: prompts are
        empty, method is unknown, or probes are given to another one.
    """
    roundings = check_roundings(roundings)
    if method not in ("one_at_a_time", "probe"):
        raise MixDQError(f"method is {method!r}, expected 'one_at_a_time' or 'probe'")
    if probes is not None and method != "probe":
        raise MixDQError(f"probes is {probes!r}, but method is {method!r}; probes are of method 'probe'")
    prompts = check_prompts(prompts)
    size = {"height": height, "width": width, "frames": frames}
    sampling = Sampling(steps=steps, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size, **size)
    given = calibrate_as_drawn(pipe, prompts, sampling) if calibration is None else calibration
    calibration = Calibration.expect(given, "calibration")
    foldings = foldings_of(calibration.layers)
    moments = None if moments is None else folded_moments(moments, foldings)
    with as_calibrated(denoiser_of(pipe), calibration) as calibration:
        analysis = Analysis(
            pipe=pipe,
            prompts=prompts,
            sampling=sampling,
            calibration=calibration,
            weight_bits=weight_bits,
            act_bits=act_bits,
            roundings=roundings,
            moments=moments,
            rule=rule,
            budget=budget,
            store=store,
            merge=tuple(merge),
            part=part,
            workers=folding_workers(workers, foldings),
        )
        if method == "probe":
            return probe_sensitivity(analysis, probes=probes, precision=precision)
        return one_at_a_time(analysis, replay=replay)


def analyze_part(
    pipe: Any, prompts: Sequence[str], part: Part, *, store: str | os.PathLike[str], **options: Any
) -> tuple[int, int]:
    """Works on one of several equal parts of what ``analyze(pipe, prompts, **options)`` needs, for as many machines
    that share nothing but the result: evaluations (layers x bits x kind), or the probes of batches.

    Each machine calls this with its part and a store of its own; ``analyze(..., store=..., merge=[the stores])`` then
    puts them together and works on whatever is missing. A part that was stopped continues where it was.

    Returns:
        How many results are in the store, and how many all parts have together.

    Raises:
        SensitivityError: as ``analyze``; or ``method="probe"`` without a number of ``probes``.
    """
    try:
        analyze(pipe, prompts, store=store, part=part.alone(), **options)
    except Unfinished as e:
        return e.have, e.need
    raise AssertionError("a part alone never ends with a sensitivity")


def folding_workers(workers: RayWorkers | None, foldings: Mapping[str, Folding]) -> RayWorkers | None:
    """Workers that fold what they load, as the model here is."""
    if workers is None or workers.load is None or not any(foldings.values()):
        return workers
    load = workers.load

    def folding() -> Any:
        pipe = load()
        model = denoiser_of(pipe)
        fold_(model, planned_folds(model, foldings))
        return pipe

    return replace(workers, load=folding)
