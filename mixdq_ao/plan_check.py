"""Checks that a plan fits a model, and advice for layers that cannot be quantized in the model's present state."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.parameter import UninitializedParameter

from .errors import PlanError
from .expect import located
from .layer_plan import LayerPlan
from .layers import JOINT_OF, JointLinear, check_module, find_layers, in_channels
from .plan import Plan

ADAPTED = re.compile(r"[.](base_layer$|lora_\w+[.])")
"""In the names of layers that peft has wrapped or added."""


def adapter_advice(name: str) -> str | None:
    """The error message for a layer that is part of a peft adapter, judged by its name; None for other layers."""
    if not ADAPTED.search(name):
        return None
    return (
        f"layer {name!r} is part of an adapter (peft); make it permanent (pipe.fuse_lora(), then "
        "pipe.unload_lora_weights()) or unload it, plan and quantize the model, and load adapters afterwards"
    )


def prepared_advice(name: str, module: nn.Module) -> str | None:
    """The error message for a layer that was prepared for a schedule of precisions; None for other modules."""
    if not getattr(type(module), "switched", False):
        return None
    return f"layer {name!r} is prepared for a precision per step; load the original model for this, and prepare() that"


def joint_advice(name: str, module: nn.Module) -> str | None:
    """The error message for an attention whose projections diffusers has fused, so that its own layers are bypassed;
    None for other modules, and for projections fused by this library."""
    if not getattr(module, "fused_projections", False):
        return None
    joint = [j for j, parts in JOINT_OF.items() if hasattr(module, j) and all(hasattr(module, part) for part in parts)]
    if all(isinstance(getattr(module, j), JointLinear) for j in joint):
        return None
    return (
        f"attention {name!r}: its projections are fused, expected them apart; pipe.unfuse_qkv_projections() first "
        "(then mixdq_ao.unfuse_projections(model), for what that leaves), and mixdq_ao.fuse_projections(model) after "
        "quantize_"
    )


def check_plan(plan: Plan, model: nn.Module, *, need_ranges: bool = True) -> None:
    """Raises PlanError unless ``plan`` fits ``model``; ``need_ranges``: also unless every activation range is known."""
    model = check_module(model)
    for name, module in model.named_modules():
        if advice := prepared_advice(name, module) or joint_advice(name, module):
            raise PlanError(advice)
    layers = find_layers(model)
    for name, layer in plan.layers.items():
        if advice := adapter_advice(name):
            raise PlanError(advice)
        if f"{name}.base_layer" in layers:
            raise PlanError(adapter_advice(f"{name}.base_layer"))
        if name not in layers:
            near = next((n for n in layers if n.endswith("." + name) or name.endswith("." + n)), None)
            hint = f"; did you mean {near!r}?" if near else "; is the plan for another model?"
            raise PlanError(f"layer {name!r} is not a linear or convolution layer of {type(model).__name__}{hint}")
        with located(f"layer {name!r}", PlanError):
            check_layer(layers[name], layer, need_ranges=need_ranges)
        if layer.bos and plan.bos_embedding is not None and len(plan.bos_embedding) != layers[name].weight.shape[1]:
            raise PlanError(
                f"layer {name!r}: reads {layers[name].weight.shape[1]} features, "
                f"but the plan's bos_embedding has {len(plan.bos_embedding)}"
            )


def check_calibrated(layer: LayerPlan) -> None:
    """Raises PlanError if the layer's activations are to be quantized and their range is not known."""
    if not layer.calibrated:
        raise PlanError(
            f"act_bits is {layer.act_bits} but there is no act_range; run calibrate() and Plan.with_calibration(), or "
            "give --calibration"
        )


def check_layer(module: nn.Module, layer: LayerPlan, *, need_ranges: bool = True) -> None:
    """Raises PlanError unless ``module`` can be quantized as ``layer`` says."""
    if not layer.quantized:
        return
    if "weight" not in module._parameters:
        raise PlanError(
            "its weight is computed by a parametrization, weight_norm or pruning; make that permanent first (as "
            "torch.nn.utils.parametrize.remove_parametrizations or prune.remove do), or give the layer 16 bits"
        )
    check_sized(module)
    if need_ranges:
        check_calibrated(layer)
    channels = in_channels(module)
    if layer.split is not None and (not isinstance(module, nn.Conv2d) or module.groups != 1 or layer.split >= channels):
        raise PlanError(
            f"split is {layer.split}, expected less than the {channels} input channels of an ungrouped convolution"
        )
    if layer.needs_moment and isinstance(module, nn.Conv2d) and module.groups != 1:
        raise PlanError(
            f"weight_range is {layer.weight_range!r} and rounding {layer.rounding!r} on a convolution of "
            f"{module.groups} groups, expected 'minmax' or 'mse', and 'nearest'"
        )
    if layer.bos and not isinstance(module, nn.Linear):
        raise PlanError("bos is true, expected a linear layer that reads the text embedding")
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        raise PlanError(
            f"padding_mode is {module.padding_mode!r}, only 'zeros' can be quantized; give this layer 16 bits"
        )
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        raise PlanError(
            f"padding is {module.padding!r}, expected numbers; give this layer 16 bits or set the padding as numbers"
        )


def check_sized(module: nn.Module) -> None:
    """Raises PlanError for a lazy layer that has not been called."""
    if isinstance(module.weight, UninitializedParameter):
        raise PlanError("is lazy and has no sizes yet; call the model once first")
