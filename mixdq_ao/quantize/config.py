"""From a plan to a torchao config, and from the config to quantized layers."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_
from torchao.quantization.transform_module import register_quantize_module_handler

from ..errors import PlanError, QuantizationError
from ..layers import check_layer, check_plan, find_layers
from ..plan import LayerPlan, Plan
from .fake import FakeQuantizer, with_fake_quantizer, without_fake_quantizer
from .planned import check_moment, check_moment_fits, quantize_planned
from .quantizer import ActQuant, act_params, refuse_unusable
from .tensor import MixDQTensor, SplitMixDQTensor, bos_row, is_quantized

Mode = Literal["real", "fake"]


@dataclass
class MixDQLayerConfig(AOBaseConfig):
    """What one layer becomes: its LayerPlan, the mode, and what its plan asks for: the BOS embedding [K], the second
    moment of its input [K, K].

    ``mode="real"``: packed integers and integer products. ``mode="fake"``: the same rounding in floating point,
    differentiable, the weight stays a parameter.
    """

    layer: LayerPlan
    mode: Mode = "real"
    bos_embedding: Tensor | None = None
    name: str = ""
    moment: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("real", "fake"):
            raise PlanError(f"mode is {self.mode!r}, expected 'real' or 'fake'")
        if self.mode == "real" and self.layer.weight_bits == 16 and self.layer.act_bits < 16:
            raise PlanError(
                f"layer {self.name!r}: 16-bit weights with {self.layer.act_bits}-bit activations have no integer "
                "product; give both 16 bits, or use mode='fake' to measure the activation alone"
            )
        if self.layer.bos and self.bos_embedding is None:
            raise PlanError(f"layer {self.name!r}: bos is true, expected bos_embedding")
        try:
            check_moment(self.moment, self.layer)
        except PlanError as e:
            raise PlanError(f"layer {self.name!r}: {e}") from e

    def acts(self) -> tuple[ActQuant, ...]:
        """Activation parameters of the input, or of its two halves; empty with 16-bit activations."""
        if self.layer.act_bits == 16:
            return ()
        ranges = [self.layer.act_range] + ([] if self.layer.split is None else [self.layer.split_act_range])
        return tuple(act_params(*r, bits=self.layer.act_bits) for r in ranges if r is not None)


class MixDQConfig(FqnToConfig):
    """The FqnToConfig of a plan. It knows its plan, so ``quantize_`` can check the model before touching it."""

    plan: Plan
    overrides: dict[str, AOBaseConfig | None]


def mixdq_config(
    plan: Plan,
    *,
    mode: Mode = "real",
    overrides: Mapping[str, AOBaseConfig | None] | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> MixDQConfig:
    """A torchao ``FqnToConfig`` with one exact name for each layer the plan quantizes.

    Args:
        plan: what each layer becomes; layers with 16 bits both ways are left alone.
        mode: "real" or "fake", see MixDQLayerConfig.
        overrides: {layer name, or "re:" and a regular expression: any torchao config, or None to leave the
            layer alone}; they win over the plan, so other torchao features combine with it.
        moments: {layer: second moment of its input [K, K]}, from ``input_moments``: needed by layers whose rounding
            is "compensated" or whose weight_range is "output".

    Raises:
        PlanError: a layer lacks its range or its moment, or cannot be quantized as asked.
    """
    import re

    overrides = dict(overrides or {})
    patterns = [re.compile(k[3:]) for k in overrides if k.startswith("re:")]
    bos = None if plan.bos_embedding is None else torch.tensor(plan.bos_embedding, dtype=torch.float32)
    configs: OrderedDict[str, AOBaseConfig | None] = OrderedDict(overrides)
    for name, layer in plan.layers.items():
        if name in overrides or any(p.fullmatch(name) for p in patterns) or not layer.quantized:
            continue
        if not layer.calibrated:
            raise PlanError(
                f"layer {name!r}: act_bits is {layer.act_bits} but there is no act_range; "
                "run calibrate() and Plan.with_calibration()"
            )
        moment = moments.get(name) if moments is not None and layer.needs_moment else None
        configs[name] = MixDQLayerConfig(layer, mode, bos if layer.bos else None, name, moment)
    config = MixDQConfig(configs)
    config.plan, config.overrides = plan, overrides
    return config


@register_quantize_module_handler(MixDQLayerConfig)
def _quantize_layer(module: nn.Module, config: MixDQLayerConfig) -> nn.Module:
    """torchao calls this for each named module; the config is never changed."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise QuantizationError(f"layer {config.name!r} is a {type(module).__name__}, expected nn.Linear or nn.Conv2d")
    module = without_fake_quantizer(module)
    if is_quantized(module.weight):
        raise QuantizationError(f"layer {config.name!r} is quantized already; load the original model to quantize anew")
    try:
        check_layer(module, config.layer)
        check_moment_fits(config.moment, config.layer, module.weight)
        if config.mode == "fake":
            refuse_unusable(module.weight)
            return with_fake_quantizer(module, fake_quantizer(config))
        weight = quantized_weight(module.weight, config)
    except (PlanError, QuantizationError) as e:
        raise type(e)(f"layer {config.name!r}: {e}") from e
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def fake_quantizer(config: MixDQLayerConfig) -> FakeQuantizer:
    """The rounding a config asks for, in fake mode."""
    return FakeQuantizer(config.layer, config.acts(), config.bos_embedding, config.moment)


def quantized_weight(weight: Tensor, config: MixDQLayerConfig) -> MixDQTensor | SplitMixDQTensor:
    """The quantized form of a layer's weight."""
    layer, embedding = config.layer, config.bos_embedding
    acts = config.acts() or (None, None)
    quants = quantize_planned(weight, layer, config.moment)
    if layer.split is not None:
        parts = zip(quants, acts, strict=True)
        halves = [MixDQTensor.from_codes(q, layer.weight_bits, weight.dtype, act=act) for q, act in parts]
        return SplitMixDQTensor(halves[0], halves[1], weight.dtype)
    return MixDQTensor.from_codes(
        quants[0],
        layer.weight_bits,
        weight.dtype,
        act=acts[0],
        bos_embedding=None if embedding is None else embedding.to(weight.device),
        bos_output=None if embedding is None else bos_row(weight, embedding),
    )


def quantize_(model: nn.Module, config: AOBaseConfig, **kwargs: object) -> None:
    """torchao's ``quantize_``, in place, with three differences.

    A ``FqnToConfig`` is passed with ``filter_fn=None``, as torchao demands. For a config made by
    ``mixdq_config`` the whole model is checked first (names, ranges, shapes, finite weights), so that an error
    leaves it unchanged, and afterwards every planned layer is known to be quantized: torchao ignores names it
    does not find. A model of diffusers' or transformers' then knows what it holds: its ``save_pretrained``, and that of
    its pipeline, write the packed weights and the plan, and ``from_pretrained`` reads them.

    Raises:
        PlanError, QuantizationError: naming the layer, before anything is changed.
    """
    if isinstance(config, MixDQConfig):
        check_model(model, config)
    if isinstance(config, FqnToConfig):
        kwargs.setdefault("filter_fn", None)
    torchao_quantize_(model, config, **kwargs)  # type: ignore[arg-type]
    if "diffusers.models.modeling_utils" in sys.modules or "transformers.modeling_utils" in sys.modules:
        from ..models.diffusers_quantizer import attach_quantizer

        attach_quantizer(model, config.plan if isinstance(config, MixDQConfig) else None)


def check_model(model: nn.Module, config: MixDQConfig) -> None:
    """Raises PlanError or QuantizationError, naming the layer, where ``model`` cannot be quantized so."""
    check_plan(config.plan, model, need_ranges=False)
    layers = find_layers(model)
    names = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
    for name in config.overrides:
        if not name.startswith("re:") and name not in names:
            raise PlanError(f"overrides names {name!r}, which {type(model).__name__} does not have")
    for name, layer_config in config.fqn_to_config.items():
        if not isinstance(layer_config, MixDQLayerConfig):
            continue
        if is_quantized(layers[name].weight):
            raise QuantizationError(f"layer {name!r} is quantized already; load the original model to quantize anew")
        try:
            check_layer(layers[name], layer_config.layer)
            check_moment_fits(layer_config.moment, layer_config.layer, layers[name].weight)
            refuse_unusable(layers[name].weight)
        except (PlanError, QuantizationError) as e:
            raise type(e)(f"layer {name!r}: {e}") from e
