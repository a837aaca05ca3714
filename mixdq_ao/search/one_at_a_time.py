"""Sensitivity of all layers at all bit widths, each measured by a run of its own (method="one_at_a_time")."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class OneAtATime:
    """Measures every layer, kind, bit width and rounding by a run in which only that is changed.

    ``replay``: compute only what follows the changed layer.
    """

    analysis: Analysis
    replay: bool = True

    def fill(self) -> tuple[int, int]:
        """Stores the results of the analysis' part. Returns how many results of all parts are stored, and how many a
        Sensitivity needs. Raises as ``analyze``."""
        _, values, needed = self._measured()
        return len(values), needed

    def sensitivity(self) -> Sensitivity:
        """Raises Unfinished where results of other parts are missing; otherwise as ``analyze``."""
        trials, values, needed = self._measured()
        self.analysis.part.check_whole(len(values), needed)
        layers = {n: _layer(n, trials, values, self.analysis) for n in trials.called()}
        return Sensitivity(layers, self.analysis.metadata("one_at_a_time"))

    def _measured(self) -> tuple[Trials, dict[Evaluation, Result], int]:
        """The trials, the stored results after this part was worked on, and the number of results of all parts."""
        analysis, settings = self.analysis, self.analysis.settings(content=self.analysis.content)
        with analysis.results(settings) as results, torch.no_grad():
            trials = _trials(analysis, self.replay)
            every = _evaluations(trials, analysis)
            todo = [e for e in analysis.part.of_items(every) if results.get(e.key) is None]
            away = _remote(analysis, self.replay)
            pool = analysis.pool(lambda _: _evaluator(trials, analysis), away, settings, results)
            with pool, progress("analyzing", len(todo)) as bar:
                for e, result in pool.run(todo):
                    results.put(e.key, result)
                    bar.advance(note=e.key)
            return trials, {e: found for e in every if (found := results.get(e.key)) is not None}, len(every)


def _trials(analysis: Analysis, replay: bool) -> Trials:
    return Trials(analysis.pipe, analysis.prompts, analysis.sampling, replay=replay, budget=analysis.budget)


def _evaluations(trials: Trials, analysis: Analysis) -> list[Evaluation]:
    """All evaluations, in the order of the layers' first calls, each checked against its layer."""
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
    """The function that measures an evaluation in this process."""
    calibration, moments, embedding = analysis.calibration, analysis.moments, analysis.calibration.bos_tensor()

    @torch.no_grad()
    def evaluate(e: Evaluation) -> Result:
        moment = None if moments is None else moments.get(e.name)
        images = analysis.rule(e.name) == "content"
        return _finite(trials.measure(e.name, e.layer(calibration), embedding, images=images, moment=moment))

    return evaluate


def _remote(analysis: Analysis, replay: bool) -> Build[Evaluation, Result]:
    """Builds that function on a worker, which makes a reference run of its own."""
    sent = replace(analysis, pipe=None, workers=None, store=None, merge=())

    @torch.no_grad()
    def build(pipe: Any) -> Callable[[Evaluation], Result]:
        own = replace(sent, pipe=pipe)
        return _evaluator(_trials(own, replay), own)

    return build


def _finite(result: Result) -> Result:
    """The figures of a trial, those that are not finite replaced: an error power by OVERFLOW, an SSIM by 0."""
    instead = {"error": OVERFLOW, "ssim": 0.0}
    return {name: value if math.isfinite(value) else instead[name] for name, value in result.items()}


def _layer(name: str, trials: Trials, values: Mapping[Evaluation, Result], analysis: Analysis) -> LayerSensitivity:
    own, group = {e: v for e, v in values.items() if e.name == name}, analysis.rule(name)
    errors = {e: v["error"] for e, v in own.items()}
    scores = {e: v["ssim"] if group == "content" else sqnr_from_error(v["error"]) for e, v in own.items()}
    return layer_sensitivity(trials.layers[name], analysis.calibration.layers[name], group, errors, scores)
