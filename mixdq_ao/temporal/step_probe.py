"""Estimates the error in the final pictures from rounding each layer at each denoising step, with few random probes.

``allocate_steps`` takes the result of ``probe_steps`` to allocate bits per layer *and* step. The estimator is that of
``search.probe_batch``: random signs over the pictures are backpropagated through the decoder, the scheduler and all
later steps. Here the answers of each step are squared separately instead of being summed over the steps first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import SensitivityError
from ..expect import whole
from ..layers import group_of
from ..models.pipelines import Sampling, check_prompts
from ..progress import progress
from ..search.analysis import Analysis
from ..search.batches import batches
from ..search.calibrate import calibrate_as_drawn
from ..search.calibration import Calibration
from ..search.layer_sensitivity import layer_sensitivity
from ..search.metrics import OVERFLOW
from ..search.probe_batch import BatchProbe, signs
from ..search.probe_delta import LayerDeltas, deltas_of
from ..search.probe_trace import frozen_pipeline
from ..search.sensitivity import Sensitivity
from ..search.smoothing import as_calibrated
from ..search.watch import denoiser_of

AT_ONCE = 4
"""Probes of a batch that are backpropagated together, through the same graphs, between two writes to the store."""
Record = dict[str, float]


def probe_steps(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    calibration: Calibration | None = None,
    weight_bits: Sequence[int] = (2, 4, 8),
    act_bits: Sequence[int] = (4, 8),
    probes: int = 8,
    guidance_scale: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    store: str | os.PathLike[str] | None = None,
    budget: int = 4 << 30,
) -> dict[int, Sensitivity]:
    """{step: Sensitivity}: for each step and layer, the relative error power of the final *pictures* if only this layer
    is rounded at only this step; to first order, estimated from ``probes`` backward passes. Scores are empty.

    Errors of single layers and steps nearly add up. ``over_the_run`` sums those of all steps, for bits per layer.

    Args:
        pipe, prompts, calibration, weight_bits, act_bits, guidance_scale, seed, batch_size, height, width, frames: as
            for ``analyze``.
        steps: number of steps of the run; each has to call the denoiser once.
        probes: the relative standard error of the estimates is about sqrt(2 / (probes x prompts)).
        store: a file that every probe is appended to; the same call continues from it.
        budget: bytes of layers' output changes kept between probes.

    Raises:
        SensitivityError: an argument is wrong, a step calls the denoiser more than once, gradients do not pass, or the
            store cannot be used.
        MixDQError: prompts are empty.
    """
    whole(probes, "probes", error=SensitivityError)
    texts = check_prompts(prompts)
    size = {"height": height, "width": width, "frames": frames}
    sampling = Sampling(steps=steps, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size, **size)
    given = calibrate_as_drawn(pipe, texts, sampling) if calibration is None else calibration
    calibration = Calibration.expect(given, "calibration")
    with as_calibrated(denoiser_of(pipe), calibration) as calibration:
        analysis = Analysis(
            pipe=pipe,
            prompts=texts,
            sampling=sampling,
            calibration=calibration,
            weight_bits=weight_bits,
            act_bits=act_bits,
            budget=budget,
            store=store,
        )
        return _each_step(analysis, probes)


def _each_step(analysis: Analysis, probes: int) -> dict[int, Sensitivity]:
    """``probe_steps`` for a model in the state it was calibrated in."""
    deltas = deltas_of(analysis.model, *analysis.choices)
    parts, steps = list(batches(analysis.prompts, analysis.sampling)), analysis.sampling.steps
    with analysis.results(analysis.settings(method="probe each step", bits=analysis.bits)) as results:
        for index, part in enumerate(parts):
            todo = [k for k in range(probes) if results.get(_key(k, index)) is None]
            if todo:
                batch = BatchProbe(analysis.pipe, *part, index, deltas, set(deltas), analysis.budget)
                for k, record in _records(batch, todo, steps):
                    results.put(_key(k, index), record)
        records = [results.results[_key(k, index)] for k in range(probes) for index in range(len(parts))]
    metadata = analysis.metadata("probe each step", probes=probes)
    return {s: _sensitivity(s, records, deltas, analysis.calibration, metadata) for s in range(steps)}


def over_the_run(steps: Mapping[int, Sensitivity]) -> Sensitivity:
    """The sum of the errors of all steps, for choosing bits per layer that are the same at all steps."""
    parts = list(steps.values())
    layers = {}
    for name, layer in parts[0].layers.items():
        weight, act = ([s.layers[name].errors(kind) for s in parts] for kind in ("weight", "act"))
        layers[name] = replace(layer, weight_errors=_added(weight), act_errors=_added(act))
    return Sensitivity(layers, parts[0].metadata)


def _added(tables: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {bits: sum(table[bits] for table in tables) for bits in tables[0]}


def _key(probe: int, batch: int) -> str:
    return f"probe {probe}|batch {batch}"


def _records(batch: BatchProbe, probes: Sequence[int], steps: int) -> Iterator[tuple[int, Record]]:
    """Yields (probe, {"step|layer|kind|bits": sum of p^2 over samples, "power": of the pictures}), ``AT_ONCE`` at a
    time."""
    calls, images = batch.trace.steps, batch.trace.images
    if len(calls) != steps:
        raise SensitivityError(
            f"a run of {steps} steps calls the denoiser {len(calls)} times, expected once a step; use a scheduler of "
            "first order, or analyze(method='probe') for all steps together"
        )
    assert images is not None  # asked for: every layer is judged by them
    power = float(images.detach().double().square().sum())
    with progress("probing each step", len(probes) * steps) as bar:
        for start in range(0, len(probes), AT_ONCE):
            part = probes[start : start + AT_ONCE]
            cotangents = {k: batch.trace.picture_gradients(signs(images, *batch.key, k, "picture")) for k in part}
            records: dict[int, Record] = {k: {"power": power} for k in part}
            for step in reversed(range(steps)):
                for k in part:
                    records[k] |= _pulled(batch, step, cotangents[k], power)
                    bar.advance(note=f"step {step}")
            yield from records.items()


def _pulled(batch: BatchProbe, step: int, cotangents: list[Tensor], power: float) -> Record:
    """Backpropagates one probe through one step, and adds its gradients to the ``cotangents`` of earlier steps."""
    with frozen_pipeline(batch.pipe):
        answers, at_links = batch.tape(step).pull(cotangents[step], set(batch.deltas))
    for earlier, g in enumerate(batch.trace.earlier_gradients(step, at_links)):
        cotangents[earlier] = cotangents[earlier] + g
    record: Record = {}
    for name, p in answers.items():
        values = _by_sample(p, batch.trace.count).double().square().sum(0).tolist()
        for choice, value in zip(batch.deltas[name].choices, values, strict=True):
            record[f"{step}|{choice.key}"] = value if math.isfinite(value) else OVERFLOW * power
    return record


def _by_sample(answers: Tensor, count: int) -> Tensor:
    """Sums answers [rows, choices] over the rows of one sample (two with guidance): [count, choices]; over all rows,
    [1, choices], if ``count`` does not divide them."""
    if answers.shape[0] % count:
        return answers.sum(0, keepdim=True)
    return answers.reshape(-1, count, answers.shape[1]).sum(0)


def _sensitivity(
    step: int,
    records: Sequence[Record],
    deltas: Mapping[str, LayerDeltas],
    calibration: Calibration,
    metadata: Mapping[str, Any],
) -> Sensitivity:
    power = sum(r["power"] for r in records)  # every batch as often as it was probed, like the sums
    called, layers = {key.split("|")[1] for r in records for key in r if "|" in key}, {}
    for name, delta in deltas.items():
        if name in called:
            errors = {c: sum(r.get(f"{step}|{c.key}", 0.0) for r in records) / power for c in delta.choices}
            layers[name] = layer_sensitivity(delta.module, calibration.layers[name], group_of(name), errors)
    return Sensitivity(layers, {**metadata, "step": step})
