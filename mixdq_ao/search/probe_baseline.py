"""A published first-order score of layers, which benchmarks compare the random probes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.pipelines import Sampling, check_prompts
from .batches import batches
from .calibration import Calibration
from .probe_batch import BatchProbe
from .probe_delta import deltas_of
from .sensitivity import Kind
from .watch import denoiser_of

Scores = dict[Kind, dict[str, dict[int, float]]]


def gradient_scores(
    pipe: Any,
    prompts: Sequence[str],
    calibration: Calibration,
    *,
    sampling: Sampling | None = None,
    weight_bits: Sequence[int] = (2, 4, 8),
    act_bits: Sequence[int] = (4, 8),
    probes: int = 4,
    budget: int = 4 << 30,
) -> Scores:
    """Scores ``sum((dL/dY * dY)^2)`` over the elements of each layer's output Y, by which NVIDIA ModelOpt's
    ``auto_quantize`` ranks layers.

    ModelOpt takes the gradient of a task loss. Distance to the reference output has gradient zero at the reference, so
    L here is the loss of a random probe, <v, output> with random signs v, averaged over ``probes``. In expectation the
    score is ``sum_j |J_j|^2 dY_j^2``, J_j the column of the Jacobian for element j: the output's error power if the
    errors of a layer's elements were independent. ``Probing`` squares after summing and so
    keeps their correlation. For ranking only: there is no unit.

    Returns:
        {"weight" or "act": {layer: {bits: score, summed over samples and steps}}}.
    """
    sampling, prompts = sampling or Sampling(), check_prompts(prompts)
    deltas = deltas_of(denoiser_of(pipe), calibration, weight_bits, act_bits)
    scores: Scores = {"weight": {}, "act": {}}
    for index, (part, drawn) in enumerate(batches(prompts, sampling)):
        batch = BatchProbe(pipe, part, drawn, index, deltas, frozenset(), budget)
        for k in range(probes):
            for name, values in batch.scores(k, _elementwise).items():
                for choice, value in zip(deltas[name].choices, values.tolist(), strict=True):
                    own = scores[choice.kind].setdefault(name, {})
                    own[choice.bits] = own.get(choice.bits, 0.0) + value / probes
    return scores


def _elementwise(deltas: Tensor, gradient: Tensor) -> Tensor:
    """Sum of (g dY)^2: deltas [groups, choices, n], gradient [groups, n] -> [groups, choices]."""
    return torch.bmm(deltas.square(), gradient.square().unsqueeze(-1)).squeeze(-1)
