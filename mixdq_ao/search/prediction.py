"""Checks the predicted error of whole plans by measuring it on the model.

The additive program predicts that the error powers of single layers add up. Whether they do depends on the model:
``measured_errors`` measures some plans, ``Agreement`` compares them with the prediction, and ``with_measured`` writes
both into a plan's metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SensitivityError
from ..layer_plan import LayerPlan
from ..layers import find_layers
from ..models.pipelines import Sampling, check_prompts
from ..plan import Plan
from ..plan_check import check_plan
from ..progress import progress
from ..quantize.config import MixDQLayerConfig, folded_as_planned, mixdq_config
from .additive import additive_errors
from .batches import batches
from .probe_stats import rank_correlation
from .roundings import rounded_as
from .sensitivity import Sensitivity
from .trial import rounding, run, signal_power
from .watch import denoiser_of

CONCENTRATION = 0.7
"""Dirichlet parameter of random plans. Below 1 it favours uneven shares of the widths, so that plans spread from nearly
all low bits to nearly all high ones. Not tuned."""


@contextmanager
def faked(model: nn.Module, plan: Plan, moments: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Inside the block ``model`` runs in fake mode by ``plan``; afterwards it is restored. Takes a byte a weight."""
    check_plan(plan, model)
    layers = find_layers(model)
    with ExitStack() as stack:
        folded = stack.enter_context(folded_as_planned(model, mixdq_config(plan, mode="fake", moments=moments)))
        for name, config in folded.fqn_to_config.items():
            assert isinstance(config, MixDQLayerConfig)
            stack.enter_context(rounding(layers[name], config))
        yield


@torch.no_grad()
def measured_errors(
    pipe: Any,
    plans: Sequence[Plan],
    prompts: Sequence[str],
    *,
    sampling: Sampling | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> list[float]:
    """Relative error power of the denoiser's output, over all prompts and steps, of each plan (with its ranges): the
    quantity that ``Allocation.predicted_error`` predicts.

    Plans run in fake mode, in place: the model is never copied, and back in full precision afterwards. Raises PlanError
    where a plan does not fit the model, SensitivityError where the model's output is zero or not finite.
    """
    model, parts = denoiser_of(pipe), list(batches(check_prompts(prompts), sampling or Sampling()))
    references = [run(pipe, part, drawn, images=False).denoised for part, drawn in parts]
    power = signal_power(references)
    errors = []
    with progress("measuring plans", len(plans)) as bar:
        for plan in plans:
            noise = 0.0
            with faked(model, plan, moments):
                for (part, drawn), reference in zip(parts, references, strict=True):
                    output = run(pipe, part, drawn, images=False).denoised
                    noise += (output.double() - reference.double()).square().sum().item()
            errors.append(noise / power)
            bar.advance()
    return errors


def check_prediction(
    pipe: Any,
    sensitivity: Sensitivity,
    plan: Plan,
    prompts: Sequence[str],
    *,
    ranges: Callable[[Plan], Plan],
    count: int = 0,
    sampling: Sampling | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Measures the error of ``plan`` and returns the plan with the measurement in its metadata (see ``with_measured``).

    Args:
        ranges: gives a plan its activation ranges (``lambda p: p.with_calibration(calibration)``).
        count: number of random plans, over the layers that ``plan`` quantizes, to measure as well: their agreement with
            their predictions says how far predictions can be trusted on this model. At least 2, or 0 for none.

    Raises:
        SensitivityError: count is 1, or errors or moments for the random plans are missing. Nothing was measured then.
    """
    if count == 1 or count < 0:
        raise SensitivityError(f"count is {count}, expected 0 or at least 2 random plans")
    others = [_within(other, plan) for other in random_plans(sensitivity, count)] if count else []
    predicted = [predicted_error(sensitivity, other) for other in others]
    _check_moments(others, moments)
    measured = measured_errors(pipe, [ranges(p) for p in (plan, *others)], prompts, sampling=sampling, moments=moments)
    if not count:
        return with_measured(plan, measured[0])
    return with_measured(plan, measured[0], agreement=Agreement.of(predicted, measured[1:]))


def _within(other: Plan, plan: Plan) -> Plan:
    """``other`` restricted to the layers that ``plan`` quantizes, with the activation bits of ``plan``."""
    layers = {
        n: replace(other.layers[n], act_bits=layer.act_bits) if layer.weight_bits < 16 and n in other.layers else layer
        for n, layer in plan.layers.items()
    }
    return replace(other, layers=layers)


def _check_moments(plans: Sequence[Plan], moments: Mapping[str, Tensor] | None) -> None:
    for name, layer in (item for plan in plans for item in plan.layers.items()):
        if layer.needs_moment and moments is None:
            raise SensitivityError(
                f"layer {name!r}: random plans round it as it was analyzed, {layer.weight_range!r} and "
                f"{layer.rounding!r}, which needs second moments; pass moments=input_moments(...), or count=0"
            )


def predicted_error(sensitivity: Sensitivity, plan: Plan) -> float:
    """Summed error power of the plan's layers, weights and activations, as the additive program sums it.

    Raises SensitivityError naming a layer and bits that were not measured.
    """
    total = 0.0
    for kind in ("weight", "act"):
        table = additive_errors(sensitivity, kind)[0]
        for name, layer in plan.layers.items():
            bits = layer.weight_bits if kind == "weight" else layer.act_bits
            if bits < 16:
                if bits not in table.get(name, {}):
                    raise SensitivityError(f"layer {name!r}: no {kind}_errors at {bits} bits; analyze with {bits} bits")
                total += table[name][bits]
    return total


def random_plans(
    sensitivity: Sensitivity, count: int, *, seed: int = 0, weight_bits: Sequence[int] | None = None, act_bits: int = 8
) -> list[Plan]:
    """``count`` plans without ranges. Each draws shares of the widths from a Dirichlet distribution, then every layer's
    width by these shares. Layers are rounded as their errors were measured.

    ``weight_bits``: None for the widths at which every layer has errors. Raises SensitivityError where these are fewer
    than 2.
    """
    weight_bits = _common_widths(sensitivity) if weight_bits is None else weight_bits
    generator, layers = np.random.default_rng(seed), sensitivity.layers
    plans = []
    for _ in range(count):
        shares = generator.dirichlet(np.full(len(weight_bits), CONCENTRATION))
        drawn = generator.choice(weight_bits, size=len(layers), p=shares).tolist()
        pairs = zip(layers, drawn, strict=True)
        planned = {n: LayerPlan(weight_bits=b, act_bits=act_bits) for n, b in pairs}
        rounded = {n: rounded_as(p, layers[n].rounding(p.weight_bits)) for n, p in planned.items()}
        plans.append(Plan(rounded, {"source": "random"}))
    return plans


def _common_widths(sensitivity: Sensitivity) -> list[int]:
    """Weight bits below 16 at which all layers with any errors have one, rising."""
    tables = [set(layer.weight_errors) for layer in sensitivity.layers.values() if layer.weight_errors]
    widths = sorted(set.intersection(*tables) - {16}) if tables else []
    if len(widths) < 2:
        raise SensitivityError(
            f"all layers have weight_errors at {widths} bits, expected 2 widths at least to draw random plans from; "
            "analyze all layers with the same weight_bits, or give count=0"
        )
    return widths


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of predictions (any unit, higher is worse) with measured errors of whole plans.

    Attributes:
        plans: number of plans.
        rank: Spearman's correlation.
        log_correlation: Pearson's of the logarithms; None where a value is not positive, or where all predictions or
            all errors are equal.
        ratio: median of measured / predicted; spread: standard deviation of its natural logarithm; None where a value
            is not positive.
    """

    plans: int
    rank: float
    log_correlation: float | None = None
    ratio: float | None = None
    spread: float | None = None

    @classmethod
    def of(cls, predicted: Sequence[float], measured: Sequence[float]) -> Agreement:
        if len(predicted) != len(measured) or len(predicted) < 2:
            raise SensitivityError(
                f"{len(predicted)} predictions and {len(measured)} errors, expected as many, 2 at least"
            )
        p, m = np.array(predicted, dtype=np.float64), np.array(measured, dtype=np.float64)
        found = cls(len(p), rank_correlation(p, m))
        if min(p.min(), m.min()) <= 0:
            return found
        logs = np.log(p), np.log(m)
        gap = logs[1] - logs[0]
        constant = any(values.min() == values.max() for values in logs)
        correlation = None if constant else float(np.corrcoef(*logs)[0, 1])
        return replace(found, log_correlation=correlation, ratio=float(np.exp(np.median(gap))), spread=float(gap.std()))


def with_measured(plan: Plan, measured: float, *, agreement: Agreement | None = None) -> Plan:
    """A copy with ``measured_error`` in its metadata, its ratio to ``predicted_error`` where there is one, and the
    ``agreement`` of predictions with measurements of other plans on this model."""
    metadata: dict[str, Any] = {**plan.metadata, "measured_error": measured}
    predicted = plan.metadata.get("predicted_error")
    if isinstance(predicted, float) and predicted > 0:
        metadata["measured_over_predicted"] = measured / predicted
    if agreement is not None:
        metadata["prediction_agreement"] = asdict(agreement)
    return replace(plan, metadata=metadata)
