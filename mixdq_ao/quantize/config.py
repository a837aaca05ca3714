"""Turns a plan into a torchao config, and applies the config to a model's layers."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_
from torchao.quantization.transform_module import register_quantize_module_handler

from ..errors import PlanError, QuantizationError
from ..expect import located
from ..layer_plan import LayerPlan
from ..layers import check_module, find_layers
from ..plan import Plan
from ..plan_check import check_calibrated, check_layer, check_plan
from ..registration import QUANTIZED
from .described import describe_layers
from .fake import FakeQuantizer, refuse_own_product, with_fake_quantizer, without_fake_quantizer
from .folds import Fold, Folding, fold_, folded, folded_moments, foldings_of, planned_folds
from .planned import check_moment, check_moment_fits, quantize_planned
from .quantizer import ActQuant, act_params, refuse_unusable
from .tensor import MixDQTensor, SplitMixDQTensor, bos_row, is_quantized

Mode = Literal["real", "fake"]


@dataclass
class MixDQLayerConfig(AOBaseConfig):
    """How to quantize one layer.

    Attributes:
        layer: the layer's entry of the plan.
        mode: "real": packed integers and integer products. "fake": the same rounding in floating point, differentiable;
            the weight stays a parameter.
        bos_embedding: [K], needed where ``layer.bos`` is true.
        name: of the layer, for errors.
        moment: second moment of the input [K, K] after smoothing and rotation, needed where ``layer.needs_moment``.
        folded: whether the layer's smoothing and rotation have been folded into the weights around it; ``quantize_``
            folds and sets this.
    """

    layer: LayerPlan
    mode: Mode = "real"
    bos_embedding: Tensor | None = None
    name: str = ""
    moment: Tensor | None = None
    folded: bool = False

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
        with located(f"layer {self.name!r}", PlanError):
            check_moment(self.moment, self.layer)

    def acts(self) -> tuple[ActQuant, ...]:
        """Activation parameters of the input, or of its two halves if split; empty with 16-bit activations."""
        if self.layer.act_bits == 16:
            return ()
        ranges = [self.layer.act_range] + ([] if self.layer.split is None else [self.layer.split_act_range])
        return tuple(act_params(*r, bits=self.layer.act_bits) for r in ranges if r is not None)


class MixDQFqnConfig(FqnToConfig):
    """The FqnToConfig of a plan. It keeps the plan, so that ``quantize_`` can check the model before changing it."""

    def __init__(
        self,
        fqn_to_config: OrderedDict[str, AOBaseConfig | None],
        plan: Plan,
        overrides: dict[str, AOBaseConfig | None],
    ) -> None:
        super().__init__(fqn_to_config)
        self.plan, self.overrides = plan, overrides

    def after_folding(self) -> MixDQFqnConfig:
        """A copy for a model that the plan's smoothing and rotation have been folded into."""
        configs = OrderedDict((n, _after_folding(c)) for n, c in self.fqn_to_config.items())
        return MixDQFqnConfig(configs, self.plan, self.overrides)


def _after_folding(config: AOBaseConfig | None) -> AOBaseConfig | None:
    if not isinstance(config, MixDQLayerConfig) or not config.layer.folds_input:
        return config
    config = copy.copy(config)
    config.folded = True
    return config


def mixdq_config(
    plan: Plan,
    *,
    mode: Mode = "real",
    overrides: Mapping[str, AOBaseConfig | None] | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> MixDQFqnConfig:
    """A torchao ``FqnToConfig`` with one exact name for each layer the plan quantizes.

    Args:
        plan: bits and ranges of each layer; layers with 16-bit weights and activations are left alone.
        mode: "real" or "fake", see MixDQLayerConfig.
        overrides: {name of a layer or weight, or "re:" and a regular expression: any torchao config, or None to leave
            the layer alone}; they take precedence over the plan, so that other torchao features combine with it.
        moments: {layer: second moment of its input [K, K]}, from ``input_moments``: needed by layers whose rounding
            is "compensated" or whose weight_range is "output". Moments are of the model before smoothing and rotation,
            which this function applies to them.

    Raises:
        PlanError: a layer lacks its range or its moment, or cannot be quantized as asked.
    """
    plan = Plan.expect(plan, "plan")
    overrides = dict(overrides or {})
    if "_default" in overrides:
        _refuse_reserved("_default")
    decided = overridden(overrides)
    bos = None if plan.bos_embedding is None else torch.tensor(plan.bos_embedding, dtype=torch.float32)
    if moments is not None:
        needing = {n: Folding.of(v) for n, v in plan.layers.items() if v.needs_moment and v.folds_input}
        moments = folded_moments(moments, needing) if needing else moments
    configs: OrderedDict[str, AOBaseConfig | None] = OrderedDict(overrides)
    for name, layer in plan.layers.items():
        if decided(name) or decided(f"{name}.weight") or not layer.quantized:
            continue
        _refuse_reserved(name)
        with located(f"layer {name!r}", PlanError):
            check_calibrated(layer)
        moment = moments.get(name) if moments is not None and layer.needs_moment else None
        configs[name] = MixDQLayerConfig(layer, mode, bos if layer.bos else None, name, moment)
    return MixDQFqnConfig(configs, plan, overrides)


def _refuse_reserved(name: str) -> None:
    """Raises PlanError for a layer name that torchao configs reserve."""
    if name == "_default" or name.startswith("re:"):
        raise PlanError(
            f"layer {name!r}: torchao reads '_default' and names that begin with 're:' as rules for many layers; name "
            "the module otherwise, or give the layer 16 bits"
        )


@register_quantize_module_handler(MixDQLayerConfig)
def _quantize_layer(module: nn.Module, config: MixDQLayerConfig) -> nn.Module:
    """Quantizes one layer; torchao calls this for each module that a config names. The config is not changed."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise QuantizationError(f"layer {config.name!r} is a {type(module).__name__}, expected nn.Linear or nn.Conv2d")
    if is_quantized(module.weight):
        raise QuantizationError(f"layer {config.name!r} is quantized already; load the original model to quantize anew")
    with located(f"layer {config.name!r}", PlanError, QuantizationError):
        _check_folded(config)
        check_layer(module, config.layer)
        check_moment_fits(config.moment, config.layer, module.weight)
        if config.mode == "fake":
            refuse_unusable(module.weight)
            quantizer = fake_quantizer(config)
            return with_fake_quantizer(without_fake_quantizer(module), quantizer)
        weight = quantized_weight(module.weight, config)
    module = without_fake_quantizer(module)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def fake_quantizer(config: MixDQLayerConfig) -> FakeQuantizer:
    """The fake-mode rounding of a layer. Raises QuantizationError where the model must be folded first."""
    _check_folded(config)
    return FakeQuantizer(config.layer, config.acts(), config.bos_embedding, config.moment)


def quantized_weight(weight: Tensor, config: MixDQLayerConfig) -> MixDQTensor | SplitMixDQTensor:
    """The quantized form of a layer's weight. Raises QuantizationError where the model must be folded first."""
    _check_folded(config)
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


def _check_folded(config: MixDQLayerConfig) -> None:
    if config.layer.folds_input and not config.folded:
        raise QuantizationError(
            "its plan has smoothing or rotation, which changes other layers too; quantize the whole model with "
            "mixdq_ao.quantize_(model, mixdq_config(plan))"
        )


@contextmanager
def folded_as_planned(model: nn.Module, config: MixDQFqnConfig) -> Iterator[MixDQFqnConfig]:
    """Folds the plan's smoothing and rotation into ``model`` inside the block, yields the config for the folded model,
    and restores the weights on exit."""
    with folded(model, planned_folds(model, foldings_of(config.plan.layers))):
        yield config.after_folding()


def quantize_(model: nn.Module, config: AOBaseConfig, **kwargs: object) -> None:
    """torchao's ``quantize_``, in place, with four differences.

    - A ``FqnToConfig`` is passed with ``filter_fn=None``, as torchao demands.
    - For a config made by ``mixdq_config`` the whole model is checked first (names, ranges, shapes, finite weights): an
      error leaves it unchanged, and no planned layer is skipped (torchao ignores names it does not find).
    - The plan's smoothing and rotation are folded into the weights first, including those of norms and of layers that
      are not quantized.
    - A diffusers or transformers model is marked as quantized: its ``save_pretrained``, and that of its pipeline, write
      the packed weights and the plan, and ``from_pretrained`` reads them.

    Raises:
        PlanError, QuantizationError: naming the layer, before anything is changed.
    """
    model = check_module(model)
    if isinstance(config, Plan):
        raise QuantizationError("config is a Plan, expected a config: quantize_(model, mixdq_config(plan))")
    if isinstance(config, MixDQFqnConfig):
        fold_(model, check_model(model, config))
        config = config.after_folding()
    if isinstance(config, FqnToConfig):
        kwargs.setdefault("filter_fn", None)
    torchao_quantize_(model, config, **kwargs)  # type: ignore[arg-type]
    declare_quantized(model, config.plan if isinstance(config, MixDQFqnConfig) else None)


def declare_quantized(model: nn.Module, plan: Plan | None = None) -> None:
    """Marks a model as quantized: its layers print their precision, and ``save_pretrained`` of diffusers or
    transformers works. ``quantize_`` and loading call this.

    ``plan``: the plan that quantized the model, to keep its exact ranges and metadata; the plan of layers that it does
    not name is kept, or else read from their tensors.
    """
    describe_layers(model)
    for attach in QUANTIZED:
        attach(model, plan)


def overridden(overrides: Mapping[str, Any]) -> Callable[[str], bool]:
    """A function that tells whether ``overrides`` (names, or "re:" and an expression) match a layer's name."""
    patterns = [_pattern(k) for k in overrides if k.startswith("re:")]
    return lambda name: name in overrides or any(p.fullmatch(name) for p in patterns)


def _pattern(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key[3:])
    except re.error as e:
        raise PlanError(f"overrides names {key!r}, which is no regular expression: {e}") from e


def _check_overrides(model: nn.Module, layers: Mapping[str, nn.Module], overrides: Mapping[str, Any]) -> None:
    """Raises PlanError unless each key names a module or parameter of ``model`` that contains no other layers, or
    matches one, and each value is a torchao config or None."""
    names = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
    for key, config in overrides.items():
        if config is not None and not isinstance(config, AOBaseConfig):
            raise PlanError(f"overrides gives {key!r} {config!r:.60}, expected a torchao config or None")
        if isinstance(config, MixDQLayerConfig) and key not in layers:
            raise PlanError(
                f"overrides gives {key!r} a MixDQLayerConfig, expected the name of one layer: its range and BOS row "
                "are that layer's own; plan the layers, or name each"
            )
        if key.startswith("re:"):
            if not any(map(_pattern(key).fullmatch, names)):
                raise PlanError(f"overrides names {key!r}, which matches no layer of {type(model).__name__}")
        elif key not in names:
            raise PlanError(f"overrides names {key!r}, which {type(model).__name__} does not have")
        elif key not in layers and any(name.startswith(f"{key}.") for name in layers):
            inside = f"re:{re.escape(key)}[.].*"
            raise PlanError(f"overrides names {key!r}, which holds layers; name those, as {inside!r} does")


def _try_overrides(model: nn.Module, overrides: Mapping[str, Any]) -> None:
    """Applies the overrides to a copy of each layer they match, one at a time, so that an error does not come half way
    through the model. Raises QuantizationError naming the layer.
    """
    decided = overridden({key: config for key, config in overrides.items() if config is not None})
    for name, module in model.named_modules():
        if not any(map(decided, (name, *(f"{name}.{parameter}" for parameter in module._parameters)))):
            continue
        try:
            torchao_quantize_(_alone(name, copy.deepcopy(module)), FqnToConfig(OrderedDict(overrides)), filter_fn=None)
        except Exception as e:
            raise QuantizationError(f"layer {name!r}: what overrides say of it cannot be done: {e}") from e


def _alone(name: str, module: nn.Module) -> nn.Module:
    """A model that holds only ``module``, under that name."""
    for part in reversed(name.split(".")):
        holder = nn.Module()
        holder.add_module(part, module)
        module = holder
    return module


def check_model(model: nn.Module, config: MixDQFqnConfig) -> dict[Fold, Folding]:
    """Checks that ``config`` can quantize ``model``. Returns the smoothing and rotation to fold into its weights first.

    Raises PlanError or QuantizationError naming the layer.
    """
    check_plan(config.plan, model, need_ranges=False)
    layers = find_layers(model)
    _check_overrides(model, layers, config.overrides)
    for name, layer_config in config.fqn_to_config.items():
        if not isinstance(layer_config, MixDQLayerConfig):
            continue
        if is_quantized(layers[name].weight):
            raise QuantizationError(f"layer {name!r} is quantized already; load the original model to quantize anew")
        if layers[name].weight.is_meta and hasattr(layers[name], "_hf_hook"):
            raise QuantizationError(
                f"layer {name!r} is offloaded, its weight elsewhere until it is called; quantize_ first, offload then"
            )
        with located(f"layer {name!r}", PlanError, QuantizationError):
            check_layer(layers[name], layer_config.layer)
            check_moment_fits(layer_config.moment, layer_config.layer, layers[name].weight)
            refuse_unusable(layers[name].weight)
            if layer_config.mode == "fake":
                refuse_own_product(layers[name])
                _refuse_uncalled(model, name)
    folds = planned_folds(model, foldings_of(config.plan.layers))
    for fold in folds:
        if any(p.is_meta for p in model.get_submodule(fold.source).parameters()):
            raise PlanError(
                f"layer {fold.readers[0]!r}: its smoothing or rotation changes {fold.source!r} too, which has no "
                "values yet; load the whole model first, then call quantize_"
            )
    _try_overrides(model, config.overrides)
    return folds


def _refuse_uncalled(model: nn.Module, name: str) -> None:
    """Raises QuantizationError where torch multiplies with a layer's weight without calling the layer: fake mode rounds
    in the layer's call."""
    if isinstance(model.get_submodule(name), NonDynamicallyQuantizableLinear):
        raise QuantizationError(
            "nn.MultiheadAttention reads its weight and never calls it, so that fake mode would not round it; give it "
            "16 bits, or use mode='real'"
        )
    encoder = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer)
    if encoder and torch.backends.mha.get_fastpath_enabled():
        raise QuantizationError(
            "the fast path of nn.TransformerEncoderLayer reads its weight and does not call it, so that fake mode "
            "would not round it; call torch.backends.mha.set_fastpath_enabled(False) first, or use mode='real'"
        )
