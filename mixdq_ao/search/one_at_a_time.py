"""Sensitivity of all layers at all bit widths, each measured by a run of its own (method="one_at_a_time")."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..plan_check import check_layer
from ..progress import progress
from .analysis import Analysis, check_covered
from .distributed import Build
from .evaluation import Evaluation
from .layer_sensitivity import layer_sensitivity
from .metrics import OVERFLOW
from .roundings import usable
from .sensitivity import LayerSensitivity, Sensitivity, sqnr_from_error
from .trial import Trials

Result = dict[str, float]


def one_at_a_time(analysis: Analysis, *, replay: bool) -> Sensitivity:
    """What ``analyze`` gives, measured: of each layer, kind, bit width and rounding, the output with only that changed.

    Raises as ``analyze``.
    """
    settings = analysis.settings(content=analysis.content)
    with analysis.results(settings) as results, torch.no_grad():
        trials = _trials(analysis, replay)
        todo = _evaluations(trials, analysis)
        todo_now = [e for e in analysis.part.of_items(todo) if results.get(e.key) is None]
        pool = analysis.pool(lambda _: _evaluator(trials, analysis), _remote(analysis, replay), settings, results)
        with pool, progress("analyzing", len(todo_now)) as bar:
            for e, result in pool.run(todo_now):
                results.put(e.key, result)
                bar.advance(note=e.key)
        analysis.part.check_whole(sum(e.key in results.results for e in todo), len(todo))
        values = {e: results.results[e.key] for e in todo}
    layers = {n: _layer(n, trials, values, analysis) for n in trials.called()}
    return Sensitivity(layers, analysis.metadata("one_at_a_time"))


def _trials(analysis: Analysis, replay: bool) -> Trials:
    return Trials(analysis.pipe, analysis.prompts, analysis.sampling, replay=replay, budget=analysis.budget)


def _evaluations(trials: Trials, analysis: Analysis) -> list[Evaluation]:
    """All there are, in the order of the layers' first calls; each can be made of its layer."""
    check_covered(trials.called(), analysis.calibration.layers)
    found: list[Evaluation] = []
    for name in trials.called():
        for bits in analysis.weight_bits:
            ways = usable(analysis.roundings, name, trials.layers[name], analysis.moments)
            found += [Evaluation(name, "weight", bits, rounding) for rounding in ways]
        found += [Evaluation(name, "act", bits) for bits in analysis.act_bits]
    for e in found:
        check_layer(trials.layers[e.name], e.layer(analysis.calibration))
    return found


def _evaluator(trials: Trials, analysis: Analysis) -> Callable[[Evaluation], Result]:
    """What makes an evaluation's figures, here."""
    calibration, moments = analysis.calibration, analysis.moments
    given = calibration.bos_embedding
    embedding = None if given is None else torch.tensor(given, dtype=torch.float32)

    @torch.no_grad()
    def evaluate(e: Evaluation) -> Result:
        moment = None if moments is None else moments.get(e.name)
        images = analysis.rule(e.name) == "content"
        return _finite(trials.measure(e.name, e.layer(calibration), embedding, images=images, moment=moment))

    return evaluate


def _remote(analysis: Analysis, replay: bool) -> Build[Evaluation, Result]:
    """What makes them on a worker, whose reference run is its own."""
    sent = replace(analysis, pipe=None, workers=None, store=None, merge=())

    @torch.no_grad()
    def build(pipe: Any) -> Callable[[Evaluation], Result]:
        own = replace(sent, pipe=pipe)
        return _evaluator(_trials(own, replay), own)

    return build


def _finite(result: Result) -> Result:
    """A trial's figures; an output that overflows has the error power OVERFLOW and an SSIM of 0."""
    instead = {"error": OVERFLOW, "ssim": 0.0}
    return {name: value if math.isfinite(value) else instead[name] for name, value in result.items()}


def _layer(name: str, trials: Trials, values: Mapping[Evaluation, Result], analysis: Analysis) -> LayerSensitivity:
    own, group = {e: v for e, v in values.items() if e.name == name}, analysis.rule(name)
    score = lambda v: v["ssim"] if group == "content" else sqnr_from_error(v["error"])  # noqa: E731
    errors, scores = {e: v["error"] for e, v in own.items()}, {e: score(v) for e, v in own.items()}
    return layer_sensitivity(trials.layers[name], analysis.calibration.layers[name], group, errors, scores)
