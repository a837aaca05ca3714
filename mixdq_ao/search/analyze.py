"""Sensitivity analysis as MixDQ does it: one layer, one bit width at a time, everything else in full precision."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import MixDQError, SensitivityError
from ..layers import Group, GroupRule, LayerShape, check_layer, group_of, stored_bytes
from ..models.pipelines import Sampling, check_prompts, denoiser
from ..plan import LayerPlan
from ..progress import progress
from ..quantize.folds import Folding, fold_, folded_moments, foldings_of, planned_folds
from .calibrate import calibrate
from .calibration import Calibration, layer_to_json
from .distributed import Build, RayWorkers, pool_of
from .moments_file import fingerprint_of
from .part import WHOLE, Part, Unfinished
from .roundings import PLAIN, best_of, check_roundings, rounded_as, usable
from .sensitivity import LayerSensitivity, Sensitivity, sqnr_from_error
from .smoothing import as_calibrated
from .store import Store, fingerprint
from .trial import Trials

Kind = Literal["weight", "act"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One trial: which layer, weight or activation, how many bits, and how a weight is rounded."""

    name: str
    kind: Kind
    bits: int
    rounding: str = PLAIN

    @property
    def label(self) -> str:
        """Bits, and the rounding where it is not plain."""
        return str(self.bits) if self.rounding == PLAIN else f"{self.bits} {self.rounding}"

    @property
    def key(self) -> str:
        return f"{self.name}|{self.kind}|{self.label}"

    def layer(self, calibration: Calibration) -> LayerPlan:
        """The layer with only its weight, or only its input, quantized."""
        if self.kind == "weight":
            plan = rounded_as(LayerPlan(weight_bits=self.bits), self.rounding)
        else:
            plan = LayerPlan(act_bits=self.bits)
        return calibration.layers[self.name].plan(plan, bos=True, split=True)


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
        pipe: a diffusers pipeline in full precision.
        prompts: texts; 16 to 32 give a stable ranking.
        store: a file that results are appended to after each evaluation; the same call continues from it.
        method: "one_at_a_time", or "probe": estimated to first order from a few backward passes, tens of times
            faster; content layers then score in dB of the pictures (see ``probe_sensitivity``).
        calibration: ranges of the activations; calibrated on the same prompts and steps when None. Its smoothing and
            rotation are in the weights while this runs, and taken out again.
        steps, guidance_scale, seed, batch_size: see Sampling.
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
        empty.
    """
    roundings = check_roundings(roundings)
    if method not in ("one_at_a_time", "probe"):
        raise MixDQError(f"method is {method!r}, expected 'one_at_a_time' or 'probe'")
    prompts = check_prompts(prompts)
    sampling = Sampling(steps=steps, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size)
    if calibration is None:
        calibration = calibrate(
            pipe, prompts, steps=steps, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size
        )
    foldings = foldings_of(calibration.layers)
    moments = None if moments is None else folded_moments(moments, foldings)
    own: dict[str, Any] = {"weight_bits": weight_bits, "act_bits": act_bits, "roundings": roundings, "moments": moments}
    own |= {"store": store, "rule": rule, "budget": budget, "workers": folding_workers(workers, foldings)}
    own |= {"merge": tuple(merge), "part": part}
    with as_calibrated(denoiser(pipe), calibration) as calibration:
        if method == "probe":
            from .probe import probe_sensitivity

            return probe_sensitivity(pipe, prompts, sampling, calibration, probes=probes, precision=precision, **own)
        return _one_at_a_time(pipe, prompts, sampling, calibration, replay=replay, **own)


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
        fold_(denoiser(pipe), planned_folds(denoiser(pipe), foldings))
        return pipe

    return replace(workers, load=folding)


def _one_at_a_time(
    pipe: Any,
    prompts: list[str],
    sampling: Sampling,
    calibration: Calibration,
    *,
    store: str | os.PathLike[str] | None,
    weight_bits: Sequence[int],
    act_bits: Sequence[int],
    roundings: Sequence[str],
    moments: Mapping[str, Tensor] | None,
    rule: GroupRule,
    replay: bool,
    budget: int,
    workers: RayWorkers | None,
    merge: Sequence[str | os.PathLike[str]],
    part: Part,
) -> Sensitivity:
    """``analyze`` of a model that is as it was calibrated."""
    settings = {"prompts": prompts, "sampling": asdict(sampling), "calibration": calibration_key(calibration)}
    settings |= rounding_settings(roundings, moments)
    with Store(store, fingerprint(denoiser(pipe), settings)) as results, torch.no_grad():
        results.merge(merge)
        trials = Trials(pipe, prompts, sampling, replay=replay, budget=budget)
        kinds: tuple[tuple[Kind, Sequence[int]], ...] = (("weight", weight_bits), ("act", act_bits))
        todo = [
            Evaluation(n, k, b, r)
            for n in trials.called()
            for k, bits in kinds
            for b in bits
            for r in (usable(roundings, n, trials.layers[n], moments) if k == "weight" else (PLAIN,))
        ]
        for e in todo:
            check_layer(trials.layers[e.name], e.layer(calibration))
        todo_now = [e for e in part.of_items(todo) if results.get(e.key) is None]
        if workers is None:
            build = lambda _: _evaluator(trials, calibration, rule, moments)  # noqa: E731
        else:
            build = _remote(prompts, sampling, calibration, rule, moments, {"replay": replay, "budget": budget})
            build = of_same_model(build, settings, results.fingerprint)
        with pool_of(workers, pipe, build) as pool, progress("analyzing", len(todo_now)) as bar:
            for e, result in pool.run(todo_now):
                results.put(e.key, result)
                bar.advance(note=e.key)
        part.check_whole(sum(e.key in results.results for e in todo), len(todo))
        values = {e: results.results[e.key] for e in todo}
    metadata = {"prompts": len(prompts), "sampling": asdict(sampling), "method": "one_at_a_time"}
    return Sensitivity({n: _layer(trials, n, values, calibration, rule(n)) for n in trials.called()}, metadata)


def of_same_model(build: Build, settings: Mapping[str, Any], expected: str) -> Build:
    """``build``, for a worker: what it loaded must be the model that is analyzed. Raises SensitivityError."""

    def checked(pipe: Any) -> Any:
        if fingerprint(denoiser(pipe), settings) != expected:
            raise SensitivityError(
                "a worker's pipeline is not the one that is analyzed (its weights differ); make RayWorkers.load give "
                "the same weights in the same type"
            )
        return build(pipe)

    return checked


def rounding_settings(roundings: Sequence[str], moments: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """What roundings add to a store's fingerprint; nothing where they are plain."""
    settings: dict[str, Any] = {} if tuple(roundings) == (PLAIN,) else {"roundings": list(roundings)}
    return settings if moments is None or not settings else settings | {"moments": fingerprint_of(moments)}


def calibration_key(calibration: Calibration) -> dict[str, Any]:
    """What results depend on, for a store's fingerprint."""
    return {"layers": {n: layer_to_json(v) for n, v in calibration.layers.items()}, "bos": calibration.bos_embedding}


def _evaluator(
    trials: Trials, calibration: Calibration, rule: GroupRule, moments: Mapping[str, Tensor] | None
) -> Callable[[Evaluation], dict[str, float]]:
    """What makes an evaluation's figures, here."""
    embedding = None if calibration.bos_embedding is None else torch.tensor(calibration.bos_embedding)

    @torch.no_grad()
    def evaluate(e: Evaluation) -> dict[str, float]:
        moment = None if moments is None else moments.get(e.name)
        return _finite(e, trials, calibration, embedding, moment, images=rule(e.name) == "content")

    return evaluate


def _remote(
    prompts: list[str],
    sampling: Sampling,
    calibration: Calibration,
    rule: GroupRule,
    moments: Mapping[str, Tensor] | None,
    options: dict[str, Any],
) -> Build[Evaluation, dict[str, float]]:
    """What makes them on a worker, whose reference run is its own."""

    @torch.no_grad()
    def build(pipe: Any) -> Callable[[Evaluation], dict[str, float]]:
        return _evaluator(Trials(pipe, prompts, sampling, **options), calibration, rule, moments)

    return build


def _finite(
    e: Evaluation,
    trials: Trials,
    calibration: Calibration,
    embedding: Tensor | None,
    moment: Tensor | None,
    *,
    images: bool,
) -> dict[str, float]:
    """The trial's figures; an output that overflows is an error power of 1e6 and an SSIM of 0."""
    result = trials.measure(e.name, e.layer(calibration), embedding, images=images, moment=moment)
    error = result["error"]
    finite = {"error": error if math.isfinite(error) else 1e6}
    if "ssim" in result:
        finite["ssim"] = result["ssim"] if math.isfinite(result["ssim"]) else 0.0
    return finite


def _layer(
    trials: Trials,
    name: str,
    values: dict[Evaluation, dict[str, float]],
    calibration: Calibration,
    group: Group,
) -> LayerSensitivity:
    every = {e: v for e, v in values.items() if e.name == name}
    best = best_of({(e.bits, e.rounding): v["error"] for e, v in every.items() if e.kind == "weight"})
    own = {(e.kind, e.bits): v for e, v in every.items() if e.kind == "act" or e.rounding == best[e.bits]}
    shape = LayerShape.of(trials.layers[name])
    score = lambda v: v["ssim"] if group == "content" else sqnr_from_error(v["error"])  # noqa: E731
    bits = sorted(b for k, b in own if k == "weight")
    plan = lambda b: calibration.layers[name].plan(LayerPlan(weight_bits=b, act_bits=8), bos=True, split=True)  # noqa: E731
    return LayerSensitivity(
        group=group,
        weight_size=shape.weights,
        act_size=calibration.layers[name].act_size,
        weight_scores={b: score(v) for (k, b), v in own.items() if k == "weight"},
        act_scores={b: score(v) for (k, b), v in own.items() if k == "act"},
        weight_errors={b: v["error"] for (k, b), v in own.items() if k == "weight"},
        act_errors={b: v["error"] for (k, b), v in own.items() if k == "act"},
        weight_bytes={b: stored_bytes(shape, plan(b)) for b in bits},
        weight_roundings={b: r for b, r in best.items() if r != PLAIN},
    )
