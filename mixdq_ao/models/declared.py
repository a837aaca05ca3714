"""The attributes that mark a model as quantized for diffusers and transformers, and record its plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from torchao.utils import TorchAOBaseTensor

from ..layers import find_layers
from ..plan import Plan
from ..quantize.folds import find_folds
from ..quantize.tensor import is_quantized
from .diffusers_config import MixDQConfig


def remember(model: nn.Module, plan: Plan) -> None:
    """Sets ``layer_plan`` on each quantized layer, for when it is quantized anew, and ``folded`` on each module that
    smoothing or rotation is folded into, which takes no adapters (``lora.py``)."""
    for fold in find_folds(model):
        if any(name in plan.layers and plan.layers[name].folds_input for name in fold.readers):
            for name in (fold.source, *fold.readers):
                model.get_submodule(name).folded = True  # type: ignore[assignment]
    for name, module in find_layers(model).items():
        if name in plan.layers and is_quantized(module.weight):
            module.layer_plan = plan.layers[name]  # type: ignore[assignment]


def holds_quantized(model: nn.Module) -> bool:
    """Whether ``model`` has quantized layers, all with values (not on the meta device)."""
    weights = [m.weight for m in find_layers(model).values() if is_quantized(m.weight)]
    return bool(weights) and not any(w.is_meta for w in weights)


def declare(model: Any, quantizer: Any, config: MixDQConfig) -> None:
    """Sets the attributes by which diffusers and transformers recognise a quantized model."""
    quantizer.quantization_config = config
    model.hf_quantizer = quantizer
    model.quantization_method = config.quant_method
    # Both libraries refuse .to(dtype) where this is true; quantized weights support it.
    model.is_quantized = False
    remember(model, config.plan)


def dequantize_layers(model: nn.Module, *dtype: Any) -> None:
    """Replaces every weight that is a torchao subclass by a floating-point one, of ``dtype`` if given."""
    for module in find_layers(model).values():
        if isinstance(module.weight, TorchAOBaseTensor):
            weight: Any = module.weight
            module.weight = nn.Parameter(weight.dequantize(*dtype))


def register(model: Any, config: MixDQConfig) -> None:
    """Puts the plan into the config of a diffusers model."""
    with attributes_kept(model):
        model.register_to_config(quantization_config=config)


@contextmanager
def attributes_kept(model: Any) -> Iterator[None]:
    """``register_to_config`` rebuilds the config from its items only; this restores attributes set on it otherwise
    (e.g. by an IP-Adapter)."""
    before = {name: value for name, value in vars(model.config).items() if not name.startswith("_")}
    yield
    for name, value in before.items():
        if name != "quantization_config" and getattr(model.config, name, None) is not value:
            setattr(model.config, name, value)


def known_plan(model: nn.Module) -> Plan | None:
    """The plan recorded on a quantized model of diffusers or transformers, or None."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config.plan if isinstance(config, MixDQConfig) else None


def with_known(model: nn.Module, plan: Plan | None) -> Plan | None:
    """``plan``, with layers that it does not name from the plan recorded on ``model``."""
    known = known_plan(model)
    if known is None or plan is None or set(known.layers) <= set(plan.layers):
        return plan or known
    return replace(
        plan, layers={**known.layers, **plan.layers}, bos_embedding=plan.bos_embedding or known.bos_embedding
    )
