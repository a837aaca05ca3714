"""Correlations between the outputs of a model's layers, from centred Gram matrices of one call at a time.

Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414), the network orthogonality metric of OMPQ
(arXiv 2109.07865) and MPQ-Diff (arXiv 2412.00144): with the features F_i [n, d_i] of layer i over n samples,

    G_i = F_i F_i^T,   H_i = G_i centred,   ORM(i, j) = <H_i, H_j> / (|H_i| |H_j|)

Biased: H = C G C with C = I - 1/n. ORM tends to 1 for all pairs where d is much larger than n. Unbiased: H as in
Szekely and Rizzo (2014), whose inner product over n (n - 3) is the unbiased estimate of HSIC of Song et al. (2007).
With several calls the estimates of HSIC are summed before the quotient is taken (Nguyen et al. 2021, arXiv 2010.15327),
so that no sample of one call has to be kept for another.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import SensitivityError
from ..layers import find_layers
from .watch import hooked, watched

Estimator = Literal["biased", "unbiased"]
LEAST: dict[Estimator, int] = {"biased": 2, "unbiased": 4}
"""Least number of samples in a call."""
COLUMNS = 1 << 16
"""Features converted and centred at once, for all samples."""
CONSTANT = 2e-6
"""Relative deviation of an output from its mean over samples below which (or below the epsilon of its dtype) it counts
as the same for every sample: products of equal rows differ by as much in float32."""


class Enough(Exception):
    """Ends a run after the last sampled step. Never leaves this package."""


def gram(features: Tensor) -> tuple[Tensor, float]:
    """float64 [n, n] Gram matrix of features [n, d] centred over samples, and their summed squares before centring.

    Centring features rather than their products gives the same correlations, biased and unbiased, without cancellation.
    """
    samples = len(features)
    total, power = torch.zeros(samples, samples, dtype=torch.float64), 0.0
    for part in features.split(COLUMNS, 1):
        part = part if part.dtype == torch.float64 else part.float()
        power += part.square().sum(dtype=torch.float64).item()
        part = part - part.mean(0, keepdim=True)
        total += (part @ part.T).cpu().double()
    return total, power


def centred(grams: Tensor, estimator: Estimator) -> Tensor:
    """float64 [L, n, n]: H of each Gram matrix."""
    n = grams.shape[-1]
    if estimator == "biased":
        rows = grams.mean(2, keepdim=True)
        return grams - rows - rows.transpose(1, 2) + rows.mean(1, keepdim=True)
    off = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    rows = off.sum(2, keepdim=True) / (n - 2)
    rows = rows - rows.sum(1, keepdim=True) / (2 * (n - 1))
    centred = off - rows - rows.transpose(1, 2)
    return centred - torch.diag_embed(centred.diagonal(dim1=1, dim2=2))


def independence(grams: Tensor, estimator: Estimator) -> Tensor:
    """float64 [L, L]: HSIC of each pair, times the number of samples n, so that sums over calls are weighted by it."""
    n, rows = grams.shape[-1], centred(grams, estimator).flatten(1)
    return rows @ rows.T * (n / (n - 1) ** 2 if estimator == "biased" else 1 / (n - 3))


def correlations(sums: Tensor) -> Tensor:
    """float64 [L, L]: ORM from summed HSIC; 1 on the diagonal, 0 in rows and columns of layers that never varied."""
    size = sums.diagonal().clamp(min=0).sqrt()
    varies = size > 0
    scale = torch.where(varies, size, torch.ones_like(size))
    matrix = (sums / scale[:, None] / scale[None, :]).clamp(-1, 1)
    matrix = torch.where(varies[:, None] & varies[None, :], (matrix + matrix.T) / 2, torch.zeros_like(matrix))
    return matrix.diagonal_scatter(varies.double())


@dataclass(slots=True)
class _Call:
    """One call of the model at a sampled step: {layer: Gram matrix [n, n]}, summed squares and relative rounding."""

    step: int
    samples: int
    grams: dict[str, Tensor] = field(default_factory=dict)
    power: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, output: Tensor) -> None:
        """Adds an output of a layer; the features of a layer that runs several times are concatenated."""
        features = _per_sample(name, output, self.samples)
        matrix, power = gram(features)
        self.grams[name] = self.grams[name] + matrix if name in self.grams else matrix
        self.power[name] = self.power.get(name, 0.0) + power
        self.rounding[name] = max(CONSTANT, torch.finfo(output.dtype).eps)

    def varying(self, name: str) -> bool:
        deviation = self.grams[name].trace().item()
        return deviation > self.rounding[name] ** 2 * self.power[name]


class Correlator:
    """Watches a model while it runs. Use ``watch()``, run the model, then ``matrix(step)``.

    A step is identified by the value of the model's argument ``timestep``, numbered in order of first appearance; a
    model without that argument has one step. State: one [n, n] matrix a layer during a call, one [L, L] matrix a step;
    no features.

    Args:
        sampled: steps to correlate; None for all.
        stop: raise Enough at the first call after the last sampled step.

    Attributes:
        steps: {timestep: step} seen so far. act_sizes: {layer: input elements of a sample} of the layers that ran.
    """

    def __init__(
        self, model: nn.Module, estimator: Estimator, sampled: frozenset[int] | None, *, stop: bool = False
    ) -> None:
        self.model, self.sampled, self.stop = model, sampled, stop
        self.estimator: Estimator = estimator
        self.names = list(find_layers(model))
        self.steps: dict[float | None, int] = {}
        self.sums: dict[int, Tensor] = {}
        self.act_sizes: dict[str, int] = {}
        self.signature = inspect.signature(model.forward)
        self.call: _Call | None = None

    @contextmanager
    def watch(self) -> Iterator[Correlator]:
        """Observes every linear and convolution layer inside the block; all hooks are removed at its end."""
        begin = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        end = self.model.register_forward_hook(self._end)
        with hooked(begin, end), watched(self.model, self.names, self._see):
            yield self

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.signature.bind_partial(*args, **kwargs).arguments
        step = self.steps.setdefault(_timestep(given.get("timestep")), len(self.steps))
        if self.stop and self.sampled is not None and step > max(self.sampled):
            raise Enough
        wanted = self.sampled is None or step in self.sampled
        self.call = _Call(step, _samples(args, kwargs, self.estimator)) if wanted else None

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if self.call is not None:
            self.act_sizes[name] = max(self.act_sizes.get(name, 0), x.numel() // max(1, x.shape[0]))
            self.call.add(name, y.detach())

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        call, self.call = self.call, None
        if call is None:
            return
        grams = torch.zeros(len(self.names), call.samples, call.samples, dtype=torch.float64)
        for i, name in enumerate(self.names):
            if name in call.grams:
                if not bool(torch.isfinite(call.grams[name]).all()):
                    raise SensitivityError(
                        f"layer {name!r}: its output at step {call.step} holds NaN or infinity, or values beyond 1e18; "
                        "run the model in a type that holds them"
                    )
                if call.varying(name):
                    grams[i] = call.grams[name]
        hsic = independence(grams, self.estimator)
        self.sums[call.step] = self.sums[call.step] + hsic if call.step in self.sums else hsic

    def matrix(self, step: int) -> tuple[list[str], Tensor]:
        """Layers that ran, in module order, and their ORM [L, L] at a step. Raises KeyError for a step not seen."""
        ran = [i for i, name in enumerate(self.names) if name in self.act_sizes]
        return [self.names[i] for i in ran], correlations(self.sums[step][ran][:, ran])


def _timestep(value: object) -> float | None:
    if not isinstance(value, Tensor):
        return None if value is None else float(value)  # type: ignore[arg-type]
    first = value.flatten()[:1]
    if not bool((value == first).all()):
        raise SensitivityError("timestep differs between the samples of one call, expected one step a call")
    return float(first)


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any], estimator: Estimator) -> int:
    """The number of samples of a call: the leading size of the first tensor argument with more than one axis."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1]
    samples = len(tensors[0]) if tensors else 0
    if samples < LEAST[estimator]:
        raise SensitivityError(
            f"the model is called with {samples} sample{'s' * (samples != 1)}, expected at least {LEAST[estimator]} "
            f"for the {estimator} correlation; give more prompts, or larger batches"
        )
    return samples


def _per_sample(name: str, output: Tensor, samples: int) -> Tensor:
    """Features [n, d] of an output; an output of one row is repeated for every sample."""
    if output.shape[0] == 1:
        return output.reshape(1, -1).expand(samples, -1)
    if output.shape[0] % samples:
        raise SensitivityError(
            f"layer {name!r}: its output {tuple(output.shape)} has no axis of the model's {samples} samples in front"
        )
    return output.reshape(samples, -1)
