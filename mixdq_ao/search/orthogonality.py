"""Importance of layers, which is high where a layer correlates little with others: MPQ-Diff (arXiv 2412.00144).

Written from the papers' formulas (the metric is OMPQ's, arXiv 2109.07865). It measures no quantization error and no bit
width: one run of the model in full precision gives the importance of every layer at every sampled step. The paper
weights the steps exponentially; the weighting rule (``step_weights``) and the default of beta are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..document import Document
from ..errors import SensitivityError
from ..expect import expect, is_number, whole
from ..layers import find_layers, group_of
from ..models.pipelines import Sampling, check_prompts, generate
from ..plan_size import LayerShape
from ..progress import progress
from .arrays import Array
from .calibration import Calibration
from .layer_sensitivity import weight_bytes
from .orthogonality_gram import LEAST, Correlator, Enough, Estimator
from .runs import check_source
from .sensitivity import LayerSensitivity, Sensitivity
from .watch import model_of

KEYS = ("format", "version", "metadata", "estimator", "steps", "sampled", "layers", "matrices")
DECIMALS = 6
"""Decimals that correlations are rounded to; some tens of samples determine fewer."""
DECAY = 1.0
"""Default of ``importance``: the last step has e times the weight of the first."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Orthogonality(Document):
    """Correlations between the layers of a model at sampled denoising steps.

    Attributes:
        layers: {name: sizes and group of the layer}, in module order; scores and errors are empty.
        steps: denoising steps of the run. sampled: the steps correlated, rising, 0 the first (most noise).
        matrices: float64 [sampled, L, L], ORM(i, j) in [-1, 1] as defined in ``orthogonality_gram``: symmetric, 1 on
            the diagonal; rows and columns of a layer whose output was the same for every sample are 0, diagonal
            included.
        estimator: "biased" or "unbiased".
        metadata: model class, number of prompts, sampling.
    """

    FORMAT, VERSION, ERROR = "mixdq-orthogonality", 1, SensitivityError
    layers: Mapping[str, LayerSensitivity]
    steps: int
    sampled: tuple[int, ...]
    matrices: Array
    estimator: Estimator = "biased"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_estimator(self.estimator)
        if not self.layers:
            raise SensitivityError("layers is empty, expected at least one layer")
        object.__setattr__(self, "sampled", sampled_steps(self.steps, self.sampled))
        shape, size = (len(self.sampled), len(self.layers), len(self.layers)), self.matrices.shape
        if size != shape:
            raise SensitivityError(f"matrices are {size}, expected {shape}: sampled steps, layers, layers")
        if not bool((np.abs(self.matrices) <= 1).all()):
            raise SensitivityError("matrices hold a number outside -1 to 1, expected correlations")
        if not np.array_equal(self.matrices, self.matrices.transpose(0, 2, 1)):
            raise SensitivityError("matrices are not symmetric, expected ORM(i, j) = ORM(j, i)")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.layers)

    @property
    def gamma(self) -> Array:
        """float64 [sampled, L]: gamma_i, the sum of ORM(i, j) over all other layers j; 0 for a constant layer."""
        return self.matrices.sum(2) - np.diagonal(self.matrices, axis1=1, axis2=2)

    def step_importance(self, beta: float | None = None) -> Array:
        """float64 [sampled, L]: theta_i = exp(-beta gamma_i) at each sampled step; higher is more important.

        Args:
            beta: spread of the importances, > 0, as in OMPQ. None: 1 / (L - 1), which makes the exponent minus the mean
                correlation with the other layers, whatever their number. Larger values give more of the budget to the
                least correlated layers.

        Raises SensitivityError where beta is invalid, or so large that an importance overflows or underflows float64.
        """
        value = 1.0 / max(1, len(self.layers) - 1) if beta is None else beta
        expect(is_number(value) and value > 0, "beta", beta, "a finite number > 0, or None", SensitivityError)
        with np.errstate(over="ignore"):
            theta = np.exp(-value * self.gamma)
        if not bool(((theta > 0) & np.isfinite(theta)).all()):
            raise SensitivityError(
                f"beta is {value:g}, with which exp(-beta gamma) leaves float64 (gamma is up to "
                f"{np.abs(self.gamma).max():.4g}); expected less than {700 / np.abs(self.gamma).max():.3g}"
            )
        return theta

    def step_weights(self, decay: float = DECAY) -> Array:
        """float64 [sampled], sum 1: weights of the sampled steps, proportional to exp(decay p).

        p is the place of a step in the run, 0 for the first (most noise) and 1 for the last. ``decay`` > 0 gives late
        steps more weight, < 0 early ones; 0 is the plain mean. Raises SensitivityError where it is not a finite number.
        """
        return place_weights(self.sampled, self.steps, decay)

    def importance(self, *, beta: float | None = None, decay: float = DECAY) -> dict[str, float]:
        """{layer: theta} of the run: the mean of ``step_importance(beta)``, weighted by ``step_weights(decay)``."""
        theta = self.step_weights(decay) @ self.step_importance(beta)
        return dict(zip(self.layers, theta.tolist(), strict=True))

    def aggregated(self, decay: float = DECAY) -> list[list[float]]:
        """L x L: the mean of the sampled steps' ORM with the weights ``step_weights(decay)``, rows in the order of
        ``names``; for plotting."""
        mean = np.tensordot(self.step_weights(decay), self.matrices, axes=1)
        return mean.round(DECIMALS).tolist()

    def subset(self, sampled: Sequence[int]) -> Orthogonality:
        """The result restricted to fewer sampled steps. Raises SensitivityError for a step that was not sampled."""
        missing = sorted(set(sampled) - set(self.sampled))
        if missing or not sampled:
            raise SensitivityError(f"sampled is {list(sampled)}, expected some of {list(self.sampled)}")
        kept = sorted(set(sampled))
        matrices = self.matrices[[self.sampled.index(s) for s in kept]]
        return Orthogonality(self.layers, self.steps, tuple(kept), matrices, self.estimator, self.metadata)

    def to_json(self) -> dict[str, Any]:
        """The document; matrices as their lower triangles with the diagonal, row after row: L (L + 1) / 2 numbers."""
        rows, columns = np.tril_indices(len(self.layers))
        return {
            **self.header(),
            "estimator": self.estimator,
            "steps": self.steps,
            "sampled": list(self.sampled),
            "layers": {n: v.to_json() for n, v in self.layers.items()},
            "matrices": [m[rows, columns].tolist() for m in self.matrices],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Orthogonality:
        for problem, names in (("unknown", set(document) - set(KEYS)), ("missing", set(KEYS) - set(document))):
            if names:
                raise SensitivityError(f"{problem} key {min(names)!r}; expected {', '.join(KEYS)}")
        if not isinstance(document["metadata"], dict):
            raise SensitivityError(f"metadata is {type(document['metadata']).__name__}, expected an object")
        layers = Sensitivity.from_json({"layers": document["layers"], "metadata": {}}).layers
        matrices, sampled = document["matrices"], document["sampled"]
        if not isinstance(matrices, list) or not isinstance(sampled, list):
            raise SensitivityError("matrices and sampled: expected two lists, a matrix for each sampled step")
        full = [_symmetric(i, m, len(layers)) for i, m in enumerate(matrices)]
        shaped = np.array(full, dtype=np.float64).reshape(len(full), len(layers), len(layers))
        return cls(layers, document["steps"], tuple(sampled), shaped, document["estimator"], document["metadata"])


def check_estimator(estimator: object) -> None:
    """Raises SensitivityError unless ``estimator`` is an Estimator."""
    known = estimator in tuple(LEAST)  # a file may hold a list, which a dict cannot look up
    expect(known, "estimator", estimator, f"one of {', '.join(LEAST)}", SensitivityError)


def sampled_steps(steps: object, timesteps: int | Sequence[int] | None) -> tuple[int, ...]:
    """The steps to sample: all for None; for a number the middles of that many equal shares of the run (uniform
    sampling as in MPQ-Diff); or the given ones. Raises SensitivityError for invalid steps or timesteps."""
    steps = whole(steps, "steps", error=SensitivityError)
    if timesteps is None:
        return tuple(range(steps))
    if isinstance(timesteps, int):
        if isinstance(timesteps, bool) or not 1 <= timesteps <= steps:
            raise SensitivityError(f"timesteps is {timesteps!r}, expected 1 to {steps}, the steps of the run")
        return tuple(int((i + 0.5) * steps / timesteps) for i in range(timesteps))
    chosen = list(timesteps)
    if not chosen or not all(type(s) is int and 0 <= s < steps for s in chosen) or len(set(chosen)) < len(chosen):
        raise SensitivityError(f"sampled steps are {chosen!r}, expected different ones of 0 to {steps - 1}")
    return tuple(sorted(chosen))


def place_weights(places: Sequence[int], steps: int, decay: float) -> Array:
    """float64, sum 1: exp(decay p) of steps at the places p = step / (steps - 1) of a run."""
    expect(is_number(decay), "decay", decay, "a finite number", SensitivityError)
    exponent = decay * np.array(places, dtype=np.float64) / max(1, steps - 1)
    weights = np.exp(exponent - exponent.max())
    return weights / weights.sum()


def _symmetric(place: int, values: object, size: int) -> Array:
    expected = size * (size + 1) // 2
    listed: list[Any] = values if isinstance(values, list) else []
    if len(listed) != expected or not all(type(v) in (int, float) for v in listed):
        raise SensitivityError(
            f"matrix {place}: expected a list of {expected} numbers, the lower triangle of {size} rows"
        )
    matrix, (rows, columns) = np.zeros((size, size)), np.tril_indices(size)
    try:
        matrix[rows, columns] = matrix[columns, rows] = listed
    except OverflowError:
        raise SensitivityError(f"matrix {place}: a number is beyond float64, expected -1 to 1") from None
    return matrix


@torch.no_grad()
def orthogonality(
    pipe: Any,
    prompts: Sequence[str] | None = None,
    *,
    steps: int | None = None,
    timesteps: int | Sequence[int] | None = None,
    run: Callable[[], object] | None = None,
    estimator: Estimator = "biased",
    calibration: Calibration | None = None,
    guidance_scale: float = 0.0,
    batch_size: int = 32,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> Orthogonality:
    """Runs a model in full precision and correlates the outputs of all its linear and convolution layers.

    Gram matrices are computed while the model runs, one call and layer at a time; features are not kept. The run ends
    after the last sampled step.

    Args:
        pipe: a diffusers pipeline (its unet or transformer is observed); or any nn.Module, with ``run``.
        prompts: texts to draw, in batches of at most ``batch_size`` whose sizes differ by one at most. Samples are
            correlated within a batch, so larger batches are more informative than more batches.
        steps: denoising steps of the run (default 1). With ``run``, the number of different timesteps it passes to the
            model (default: as many as occur).
        timesteps: how many steps of the run to sample, uniformly, or a list of them; default all. Time and file size
            grow with it.
        run: for a bare module: a callable that runs it, on at least two samples a call. Calls with the same value of
            the module's argument ``timestep`` are batches of one step. A module without that argument has one step.
        estimator: "biased" (as published) or "unbiased" (batches of at least 4), see ``orthogonality_gram``.
        calibration: gives the stored bytes of each layer's weights, for budgets in bytes.
        guidance_scale, seed, height, width, frames: see Sampling.

    Raises:
        SensitivityError: an argument is wrong, fewer samples than the estimator needs, nothing ran, a sampled step did
            not occur, or an output holds NaN or infinity. MixDQError: prompts are empty.
    """
    check_estimator(estimator)
    model = model_of(pipe)
    check_source(pipe, prompts, run, SensitivityError)
    total = 1 if steps is None and run is None else steps
    sampled = None if total is None and timesteps is None else sampled_steps(total, timesteps)
    metadata: dict[str, Any] = {"model": type(model).__name__}
    watcher = Correlator(model, estimator, None if sampled is None else frozenset(sampled), stop=run is None)
    if run is not None:
        with watcher.watch():
            run()
    else:
        texts = check_prompts(prompts or ())
        batches = _batches(len(texts), batch_size, LEAST[estimator], estimator)
        drawn = Sampling(
            steps=total or 1, guidance_scale=guidance_scale, seed=seed, height=height, width=width, frames=frames
        )
        metadata |= {"prompts": len(texts), "batches": batches, "guidance_scale": guidance_scale, "seed": seed}
        metadata |= drawn.size()
        with watcher.watch(), progress("correlating", len(texts)) as bar:
            start = 0
            for count in batches:
                _draw(pipe, texts[start : start + count], replace(drawn, seed=seed + start, batch_size=count))
                start += count
                bar.advance(count)
    return _result(model, watcher, total, sampled, calibration, metadata)


def _batches(prompts: int, batch_size: int, least: int, estimator: str) -> list[int]:
    """Batch sizes that differ by one at most, none above ``batch_size``."""
    whole(batch_size, "batch_size", error=SensitivityError)
    count = math.ceil(prompts / batch_size)
    sizes = [prompts // count + (i < prompts % count) for i in range(count)]
    if min(sizes) < least:
        raise SensitivityError(
            f"{prompts} prompt{'s' * (prompts != 1)} in batches of at most {batch_size} make one of {min(sizes)}, "
            f"expected at least {least} for the {estimator} correlation; give more prompts, or larger batches"
        )
    return sizes


def _draw(pipe: Any, texts: Sequence[str], sampling: Sampling) -> None:
    try:
        for _ in generate(pipe, texts, sampling, "latent"):
            pass
    except Enough:
        pass


def _result(
    model: nn.Module,
    watcher: Correlator,
    steps: int | None,
    sampled: tuple[int, ...] | None,
    calibration: Calibration | None,
    metadata: Mapping[str, Any],
) -> Orthogonality:
    seen = len(watcher.steps)
    steps, sampled = (seen if steps is None else steps), tuple(range(seen)) if sampled is None else sampled
    if not watcher.act_sizes:
        raise SensitivityError("no linear or convolution layer ran at a sampled step; run the model itself")
    if missing := [s for s in sampled if s not in watcher.sums]:
        raise SensitivityError(f"step {missing[0]} is to be sampled, but only {seen} came; give steps={seen}")
    if seen > steps:
        raise SensitivityError(
            f"steps is {steps}, but the model was shown {seen} different timesteps; give steps={seen}, or a pipeline a "
            "scheduler with one timestep a step"
        )
    names = watcher.matrix(sampled[0])[0]
    matrices = np.stack([watcher.matrix(s)[1].numpy() for s in sampled]).round(DECIMALS)
    modules = find_layers(model)
    layers = {n: _layer(n, modules[n], watcher.act_sizes[n], calibration) for n in names}
    return Orthogonality(layers, steps, sampled, matrices, watcher.estimator, metadata)


def _layer(
    name: str, module: nn.Linear | nn.Conv2d, act_size: int, calibration: Calibration | None
) -> LayerSensitivity:
    shape, known = LayerShape.of(module), None if calibration is None else calibration.layers.get(name)
    held = {} if known is None else weight_bytes(shape, known, (2, 4, 8))
    return LayerSensitivity(
        group=group_of(name), weight_size=shape.weights, act_size=max(1, act_size), weight_bytes=held
    )
