"""Reads the plan of a quantized model from its tensors, so that a saved plan always agrees with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..layer_plan import LayerPlan
from ..layers import find_layers
from ..plan import Plan
from ..quantize.quantizer import act_bits
from ..quantize.tensor import MixDQTensor, SplitMixDQTensor, is_quantized


def plan_of(model: nn.Module, plan: Plan | None = None) -> Plan:
    """The plan that quantized ``model``.

    Where ``plan`` (the one that was used) agrees with a layer's tensors, its entry is kept, with the calibrated ranges;
    elsewhere ranges are computed from the stored scales and zero points. A layer without a quantized weight of ours is
    left out, or gets 16 bits if ``plan`` names it.
    """
    given = {} if plan is None else plan.layers
    layers: dict[str, LayerPlan] = {}
    for name, module in find_layers(model).items():
        if is_quantized(module.weight):
            found = layer_plan_of(module.weight)
            layers[name] = given[name] if name in given and same_layer(given[name], found) else found
        elif name in given:
            layers[name] = LayerPlan()
    metadata = {"source": "read from a quantized model"} if plan is None else plan.metadata
    embedding = _embedding(model) if any(layer.bos for layer in layers.values()) else None
    return Plan(layers, metadata, embedding)


def layer_plan_of(weight: object) -> LayerPlan:
    """The plan entry that describes one quantized weight. Raises TypeError for any other tensor."""
    if isinstance(weight, SplitMixDQTensor):
        first, second = layer_plan_of(weight.first), layer_plan_of(weight.second)
        return replace(first, split=weight.split, split_act_range=second.act_range)
    if not isinstance(weight, MixDQTensor):
        raise TypeError(f"{type(weight).__name__} is no quantized weight")
    return LayerPlan(
        weight_bits=weight.bits,
        act_bits=act_bits(weight.act_levels),
        symmetric=_symmetric(weight),
        act_range=_act_range(weight),
        bos=weight.bos_output is not None,
    )


def same_layer(a: LayerPlan, b: LayerPlan) -> bool:
    """Whether two entries agree except in ranges, and in symmetry, which zero points may suggest by chance."""
    return (a.weight_bits, a.act_bits, a.split, a.bos) == (b.weight_bits, b.act_bits, b.split, b.bos)


def check_plan_of(where: object, plan: Plan, state: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the weights are quantized as ``plan`` says."""
    found = {n.removesuffix(".weight"): layer_plan_of(t) for n, t in state.items() if is_quantized(t)}
    planned = {n: layer for n, layer in plan.layers.items() if layer.quantized}
    for name in sorted(set(found) | set(planned)):
        if name not in found or name not in planned or not same_layer(found[name], planned[name]):
            raise CheckpointError(
                f"{where}: layer {name!r} is planned as {_in_words(planned.get(name))} and stored as "
                f"{_in_words(found.get(name))}; config and weights are of different saves, save the model again"
            )


def _in_words(layer: LayerPlan | None) -> str:
    if layer is None:
        return "not quantized"
    split = "" if layer.split is None else f" split at {layer.split}"
    return f"W{layer.weight_bits}A{layer.act_bits}{' BOS' if layer.bos else ''}{split}"


def _symmetric(weight: MixDQTensor) -> bool:
    zero = weight.weight_zero_point
    return zero is None or bool((zero == 2 ** (weight.bits - 1)).all())


def _act_range(weight: MixDQTensor) -> tuple[float, float] | None:
    """The values of codes 0 and act_levels."""
    if weight.act_scale is None or weight.act_zero_point is None or weight.act_levels is None:
        return None
    scale, zero = weight.act_scale.item(), int(weight.act_zero_point.item())
    return -zero * scale, (weight.act_levels - zero) * scale


def _embedding(model: nn.Module) -> tuple[float, ...] | None:
    for module in find_layers(model).values():
        if isinstance(module.weight, MixDQTensor) and module.weight.bos_embedding is not None:
            return tuple(module.weight.bos_embedding.tolist())
    return None
