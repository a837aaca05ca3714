"""Query, key and value of an attention as one product (key and value where the keys are of another tensor).

diffusers' ``fuse_qkv_projections`` copies weights into a plain layer, which a quantized weight cannot become; its
attention with joint projections is used here with joint quantized weights.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import nn

from ..quantize.join import difference, joined
from ..quantize.tensor import MixDQTensor

JOINT = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}


def fuse_projections(model: nn.Module) -> tuple[str, ...]:
    """Joins the projections of every attention where they have one precision and read one tensor with one range.

    Results stay the same to the bit, and so do the bytes: the layers' own weights become views of the joint one.
    Fuse last: adapters and other precisions want the layers apart, and a fused model is not saved
    (``unfuse_projections``).

    Returns the names of the attentions that were fused; others are left as they are.
    """
    fused = []
    for name, attention in model.named_modules():
        if isinstance(attention, Attention) and type(attention.processor) is AttnProcessor2_0 and _fuse(attention):
            fused.append(name)
    return tuple(fused)


def unfuse_projections(model: nn.Module) -> None:
    """The layers compute by themselves again."""
    for attention in model.modules():
        if isinstance(attention, Attention) and getattr(attention, "fused_projections", False):
            for name in JOINT:
                if hasattr(attention, name):
                    delattr(attention, name)
            attention.fused_projections = False
            attention.set_processor(AttnProcessor2_0())


def _fuse(attention: Attention) -> bool:
    joint = "to_kv" if attention.is_cross_attention else "to_qkv"
    layers = [getattr(attention, name, None) for name in JOINT[joint]]
    if not all(type(layer) is nn.Linear and isinstance(layer.weight, MixDQTensor) for layer in layers):
        return False
    weights = [layer.weight for layer in layers]  # type: ignore[union-attr]
    sizes = {weight.shape[0] for weight in weights}
    biases = [layer.bias for layer in layers]  # type: ignore[union-attr]
    alike = len(sizes) == 1 and not any(difference(weights[0], weight) for weight in weights[1:])
    if not alike or len({bias is None for bias in biases}) > 1:
        return False
    setattr(attention, joint, _layer(weights, biases))
    rows = sizes.pop()
    for i, layer in enumerate(layers):
        part = getattr(attention, joint).weight[i * rows : (i + 1) * rows]
        layer.weight = nn.Parameter(part, requires_grad=False)  # type: ignore[union-attr]
    attention.fused_projections = True
    attention.set_processor(FusedAttnProcessor2_0())
    return True


def _layer(weights: list[MixDQTensor], biases: list[torch.Tensor | None]) -> nn.Linear:
    weight = joined(weights)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=biases[0] is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if biases[0] is not None:
        layer.bias = nn.Parameter(torch.cat([b for b in biases if b is not None]), requires_grad=False)
    return layer.eval()
