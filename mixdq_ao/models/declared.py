"""What a quantized model says of itself: the plan in diffusers' config, and each layer its part of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..layers import find_layers
from ..plan import Plan
from ..quantize.described import describe_layers
from ..quantize.folds import find_folds
from ..quantize.tensor import is_quantized
from .diffusers_config import MixDQConfig


def remember(model: nn.Module, plan: Plan) -> None:
    """Each quantized layer knows its plan, for when it is quantized anew, and prints it; all that smoothing or rotation
    is folded into know that (``lora.py``)."""
    for fold in find_folds(model):
        if any(name in plan.layers and plan.layers[name].folds_input for name in fold.readers):
            for name in (fold.source, *fold.readers):
                model.get_submodule(name).folded = True  # type: ignore[assignment]
    for name, module in find_layers(model).items():
        if name in plan.layers and is_quantized(module.weight):
            module.layer_plan = plan.layers[name]  # type: ignore[assignment]
    describe_layers(model)


def register(model: Any, config: MixDQConfig) -> None:
    """Puts the plan into the config of a diffusers model."""
    with attributes_kept(model):
        model.register_to_config(quantization_config=config)


@contextmanager
def attributes_kept(model: Any) -> Iterator[None]:
    """A config made anew has its items alone. What was set on it beside them (by an IP-Adapter, how its pictures come
    in) stays."""
    before = {name: value for name, value in vars(model.config).items() if not name.startswith("_")}
    yield
    for name, value in before.items():
        if name != "quantization_config" and getattr(model.config, name, None) is not value:
            setattr(model.config, name, value)


def known_plan(model: nn.Module) -> Plan | None:
    """The plan that diffusers or transformers know of a quantized model."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config.plan if isinstance(config, MixDQConfig) else None


def with_known(model: nn.Module, plan: Plan | None) -> Plan | None:
    """``plan`` and what was known before of layers that it does not name."""
    known = known_plan(model)
    if known is None or plan is None or set(known.layers) <= set(plan.layers):
        return plan or known
    return replace(
        plan, layers={**known.layers, **plan.layers}, bos_embedding=plan.bos_embedding or known.bos_embedding
    )
