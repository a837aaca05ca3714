"""The size of a quantized model: bytes per layer, and average bits of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil

from torch import nn

from .errors import PlanError
from .expect import is_number, located
from .layer_plan import LayerPlan
from .layers import find_layers
from .plan import Plan, PlanSummary
from .plan_check import check_plan, check_sized
from .quantize.quantizer import act_params


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of one layer: ``rows`` output channels of ``taps`` runs of ``run`` input channels each, ``bias``
    elements, ``element`` bytes of the model's own floating-point type."""

    rows: int
    taps: int
    run: int
    bias: int
    element: int = 2

    @classmethod
    def of(cls, module: nn.Linear | nn.Conv2d) -> LayerShape:
        rows, run = module.weight.shape[:2]
        taps = module.weight.shape[2] * module.weight.shape[3] if isinstance(module, nn.Conv2d) else 1
        bias = 0 if module.bias is None else module.bias.numel()
        return cls(rows, taps, run, bias, module.weight.element_size())

    @property
    def weights(self) -> int:
        return self.rows * self.taps * self.run


def stored_bytes(shape: LayerShape, layer: LayerPlan) -> int:
    """Bytes of a layer's tensors when quantized as planned, or in the model's dtype if it is not quantized.

    Per output channel: packed codes (each run of input channels padded to a byte), a float32 scale, an int8 zero
    point below 8 bits, and an element of the BOS output row where the layer has one. Per layer (or half of a split
    one) with quantized activations: a float32 scale and its reciprocal, an int32 zero point. The BOS embedding and
    equal activation parameters are shared between layers; ``summarize`` counts them once.
    """
    if layer.weight_bits == 16:
        return shape.element * (shape.weights + shape.bias)
    runs = [shape.run] if layer.split is None else [layer.split, shape.run - layer.split]
    total = shape.element * (shape.bias + (shape.rows if layer.bos else 0))
    for run in runs:
        codes = shape.rows * shape.taps * ceil(run * layer.weight_bits / 8)
        per_row = 4 + (1 if layer.weight_bits < 8 else 0)
        total += codes + per_row * shape.rows + (12 if layer.act_bits < 16 else 0)
    return total


def summarize(plan: Plan, model: nn.Module) -> PlanSummary:
    """Average bits, bytes and counts of ``plan`` on ``model``; layers that the plan does not name count as 16 bit."""
    check_plan(plan, model, need_ranges=False)
    layers = find_layers(model)
    for name, module in layers.items():
        with located(f"layer {name!r}", PlanError):
            check_sized(module)
    shapes = {n: LayerShape.of(m) for n, m in layers.items()}
    planned = {n: plan.layers.get(n, LayerPlan()) for n in layers}
    sizes = plan.metadata.get("act_sizes", {})
    if not isinstance(sizes, dict) or not all(is_number(v) and v >= 0 for v in sizes.values()):
        raise PlanError(f"metadata: act_sizes is {sizes!r:.100}, expected {{layer: elements}}; calibrate the plan anew")
    act = sizes if all(n in sizes for n in layers) else dict.fromkeys(layers, 1)
    bos = 4 * len(plan.bos_embedding or ()) if any(p.bos for p in planned.values()) else 0
    return PlanSummary(
        average_weight_bits=_mean(
            {n: p.weight_bits for n, p in planned.items()}, {n: s.weights for n, s in shapes.items()}
        ),
        average_act_bits=_mean({n: p.act_bits for n, p in planned.items()}, act),
        bytes=bos + sum(stored_bytes(shapes[n], p) for n, p in planned.items()) - _repeated_bytes(planned.values()),
        counts=dict(Counter(p.weight_bits for p in planned.values())),
        act_counts=dict(Counter(p.act_bits for p in planned.values())),
    )


def _repeated_bytes(layers: Iterable[LayerPlan]) -> int:
    """Bytes by which ``stored_bytes`` counts shared activation parameters too often: equal scales are stored once, and
    so are equal zero points of the same scale."""
    acts = [
        act_params(*r, bits=layer.act_bits)
        for layer in layers
        if layer.weight_bits < 16 and layer.act_bits < 16
        for r in (layer.act_range, layer.split_act_range)
        if r is not None
    ]
    floats, integers = {v for a in acts for v in (a.scale, a.inv_scale)}, {(a.scale, a.zero_point) for a in acts}
    return 4 * (3 * len(acts) - len(floats) - len(integers))


def _mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    total = sum(weights.values())
    return sum(values[n] * weights[n] for n in values) / total if total else 0.0
