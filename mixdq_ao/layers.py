"""The layers of a model that can be quantized: names, groups, sizes, split points, and what a plan costs on them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import UninitializedParameter

from .errors import PlanError, QuantizationError
from .jsonfile import is_number
from .plan import LayerPlan, Plan, PlanSummary
from .quantize.quantizer import act_params

Group = Literal["content", "quality"]
GroupRule = Callable[[str], Group]


def check_module(model: object) -> nn.Module:
    """The model itself where ``torch.compile`` wrapped it. Raises QuantizationError for a pipeline, or whatever else is
    no module."""
    if not isinstance(model, nn.Module):
        raise QuantizationError(
            f"model is a {type(model).__name__}, expected nn.Module, as pipe.unet or pipe.transformer"
        )
    return uncompiled(model)


def uncompiled(model: Any) -> Any:
    """What ``torch.compile`` wrapped; a model that it did not wrap as it is."""
    return getattr(model, "_orig_mod", model)


class JointLinear(nn.Linear):
    """Linear layers of one input as one product. They stay in their places, their weights views of this one's: plans
    and files speak of them, and this is no layer of its own."""


def find_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every nn.Linear and nn.Conv2d of ``model`` by name, in module order; of joint ones the layers they compute.
    794 in SDXL's UNet."""
    products = find_products(model)
    return {n: m for n, m in products.items() if not (isinstance(m, JointLinear) or _computes_others(n, products))}


JOINT_OF = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""What diffusers' attention calls its joint projections (``fused_projections``), and the layers each computes."""


def _computes_others(name: str, names: Iterable[str]) -> bool:
    """Whether a layer is diffusers' joint one, beside those it computes or computed."""
    path, _, last = name.rpartition(".")
    return last in JOINT_OF and all(f"{path}.{part}".removeprefix(".") in names for part in JOINT_OF[last])


def find_products(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers, and those that compute several of them at once. Raises QuantizationError for what is no module."""
    return {n: m for n, m in check_module(model).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


TEXT_STREAM = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
"""The text's own projections in attention over picture and text together (SD3, FLUX)."""
TEXT_PROJECTIONS = ("context_embedder", "caption_projection.linear_1", "text_embedder.linear_1", "encoder_hid_proj")
"""Names, or their ends, of layers that read the text embedding where later ones read only what they make of it."""
POOLED_TEXT = "time_text_embed."
"""In names of layers that read one pooled embedding for the whole prompt (SD3, FLUX), which has no first row."""


def group_of(name: str) -> Group:
    """MixDQ's rule: feed-forward and cross-attention layers decide the *content* of a picture (judged by SSIM),
    all others its *quality* (judged by SQNR). Section 4.2 of arXiv 2405.17873.

    Where attention is over picture and text together, its projections of the text are content too, as are layers that
    make the model's text embedding. FLUX's single blocks have their feed-forward in ``proj_mlp`` and ``proj_out``.
    """
    parts = name.split(".")
    content = any(p == "attn2" or p.startswith("ff") or p in TEXT_STREAM for p in parts)
    single = parts[0] == "single_transformer_blocks" and parts[-1] in ("proj_mlp", "proj_out")
    text = bool({"context_embedder", "caption_projection", "text_embedder"} & set(parts))
    return "content" if content or single or text else "quality"


def reads_text(name: str) -> bool:
    """Cross-attention projections that read the text embedding and nothing else (140 in SDXL)."""
    return name.endswith(("attn2.to_k", "attn2.to_v"))


def text_readers(model: nn.Module) -> frozenset[str]:
    """Layers that read the text encoders' own rows: the model's text projection where it has one (SD3, FLUX, PixArt,
    SANA, Wan), else the keys and values of cross attention."""
    layers = find_layers(model)
    projections = {n for n in layers if n.endswith(TEXT_PROJECTIONS) and POOLED_TEXT not in n}
    return frozenset(projections or (n for n in layers if reads_text(n) and _is_cross(model, n)))


def _is_cross(model: nn.Module, name: str) -> bool:
    """Whether the attention of a projection is over another tensor. Over frames (video UNets) ``attn2`` is not."""
    return getattr(model.get_submodule(name.rpartition(".")[0]), "is_cross_attention", True)


def split_points(model: nn.Module) -> dict[str, int]:
    """Channels of the first half of each concatenated shortcut input: {conv_shortcut name: channels}.

    An up block concatenates its running hidden state with a skip connection, so the split is the number of
    channels of the former: what the previous resnet (or block) put out. Read from the modules, no list.
    """
    splits: dict[str, int] = {}
    mid = getattr(getattr(model, "mid_block", None), "resnets", None)
    channels = getattr(mid[-1], "out_channels", None) if mid is not None and len(mid) else None
    for b, block in enumerate(getattr(model, "up_blocks", None) or []):
        for r, resnet in enumerate(getattr(block, "resnets", None) or []):
            shortcut = getattr(resnet, "conv_shortcut", None)
            if channels is not None and shortcut is not None and 0 < channels < resnet.in_channels:
                splits[f"up_blocks.{b}.resnets.{r}.conv_shortcut"] = channels
            channels = getattr(resnet, "out_channels", None)  # blocks of video models hold two resnets and say nothing
    return splits


ADAPTED = re.compile(r"[.](base_layer$|lora_\w+[.])")
"""In names of layers that peft has taken into one of its own, and of those it added."""


def adapter_advice(name: str) -> str | None:
    """What to do about a layer that is part of an adapter, by its name; None for any other."""
    if not ADAPTED.search(name):
        return None
    return (
        f"layer {name!r} is part of an adapter (peft); make it permanent (pipe.fuse_lora(), then "
        "pipe.unload_lora_weights()) or unload it, plan and quantize the model, and load adapters afterwards"
    )


def prepared_advice(name: str, module: nn.Module) -> str | None:
    """What to do about a layer that runs at the levels of a schedule; None for any other module."""
    if not getattr(type(module), "switched", False):
        return None
    return f"layer {name!r} is prepared for a precision per step; load the original model for this, and prepare() that"


def joint_advice(name: str, module: nn.Module) -> str | None:
    """What to do about an attention whose projections diffusers computes at once, past its layers; None for any other
    module, and where they are ours."""
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
    """Raises PlanError unless ``plan`` fits ``model``. Nothing is changed."""
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
        try:
            check_layer(layers[name], layer, need_ranges=need_ranges)
        except PlanError as e:
            raise PlanError(f"layer {name!r}: {e}") from e
        if layer.bos and plan.bos_embedding is not None and len(plan.bos_embedding) != layers[name].weight.shape[1]:
            raise PlanError(
                f"layer {name!r}: reads {layers[name].weight.shape[1]} features, "
                f"but the plan's bos_embedding has {len(plan.bos_embedding)}"
            )


def check_calibrated(layer: LayerPlan) -> None:
    """Raises PlanError where activations are to be quantized and their range is not known."""
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


def in_channels(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels  # type: ignore[union-attr,return-value]


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
    """Bytes the layer's tensors hold when quantized as planned, or in the model's own type where it is not.

    Per output channel: packed codes (each run of input channels padded to a byte), a float32 scale, an int8 zero
    point below 8 bits, a BOS row in the model's type where wanted. Per layer (or half of a split one) with
    quantized activations: a float32 scale and its reciprocal, an int32 zero point. What several layers share, the
    BOS embedding and equal activation parameters, is counted once by ``summarize``.
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
    """Figures of ``plan`` on ``model``; layers the plan does not name count as 16 bit."""
    check_plan(plan, model, need_ranges=False)
    layers = find_layers(model)
    for name, module in layers.items():
        try:
            check_sized(module)
        except PlanError as e:
            raise PlanError(f"layer {name!r}: {e}") from e
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
    """Bytes of activation parameters beyond the first of each value (of each scale, for zero points): weights hold
    equal ones once."""
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
