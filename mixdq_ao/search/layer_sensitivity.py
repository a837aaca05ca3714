"""Makes the LayerSensitivity of a layer from its measured errors and scores, for every method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..layer_plan import LayerPlan
from ..layers import Group
from ..plan_size import LayerShape, stored_bytes
from .calibration import LayerCalibration
from .evaluation import Evaluation
from .roundings import PLAIN, best_of
from .sensitivity import Kind, LayerSensitivity


def layer_sensitivity(
    module: nn.Linear | nn.Conv2d,
    own: LayerCalibration,
    group: Group,
    errors: Mapping[Evaluation, float],
    scores: Mapping[Evaluation, float] | None = None,
) -> LayerSensitivity:
    """The layer's figures, for weights those of the rounding with the least error at each bit width.

    ``errors`` and, where the method has any, ``scores`` are of the same evaluations, all of this layer.
    """
    best = best_of({(e.bits, e.rounding): error for e, error in errors.items() if e.kind == "weight"})

    def table(kind: Kind, values: Mapping[Evaluation, float] | None) -> dict[int, float]:
        kept = [e for e in errors if e.kind == kind and (kind == "act" or e.rounding == best[e.bits])]
        return {} if values is None else {e.bits: values[e] for e in kept}

    shape = LayerShape.of(module)
    return LayerSensitivity(
        group=group,
        weight_size=shape.weights,
        act_size=own.act_size,
        weight_scores=table("weight", scores),
        act_scores=table("act", scores),
        weight_errors=table("weight", errors),
        act_errors=table("act", errors),
        weight_bytes=weight_bytes(shape, own, best),
        weight_roundings={bits: rounding for bits, rounding in best.items() if rounding != PLAIN},
    )


def weight_bytes(shape: LayerShape, own: LayerCalibration, weight_bits: Iterable[int]) -> dict[int, int]:
    """{bits: bytes of the layer's tensors with 8-bit activations}, rising; the rounding of a weight does not matter."""
    plans = {bits: own.plan(LayerPlan(weight_bits=bits, act_bits=8), bos=True, split=True) for bits in weight_bits}
    return {bits: stored_bytes(shape, plans[bits]) for bits in sorted(plans)}
