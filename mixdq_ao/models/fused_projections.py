"""Query, key and value projections of an attention as one product (in cross attention key and value).

diffusers' ``fuse_qkv_projections`` copies weights into a plain layer, which dequantizes quantized ones (with a
warning); this module uses diffusers' fused attention processor with joint quantized weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import nn

from ..layers import JOINT_OF, JointLinear, check_module
from ..mixin import own_class
from ..quantize.join import difference, joined
from ..quantize.tensor import MixDQTensor
from .text_layers import TextProjection


def fuse_projections(model: nn.Module) -> tuple[str, ...]:
    """Joins the projections of every attention where they have one precision and read one tensor with one range.

    Results stay the same to the bit, and so does memory: the layers' own weights become views of the joint one. The
    model is saved as if it were not fused. Fuse last: adapters, other precisions and ``load_state_dict`` need separate
    layers (``unfuse_projections``).

    Returns the names of the fused attentions. Others stay as they are: those that are not diffusers' ``Attention`` with
    its default processor (such as the joint attention of transformers), and those whose layers differ.
    """
    model = check_module(model)
    fused = []
    for name, attention in model.named_modules():
        if isinstance(attention, Attention) and type(attention.processor) is AttnProcessor2_0 and _fuse(attention):
            fused.append(name)
    return tuple(fused)


def unfuse_projections(model: nn.Module) -> None:
    """Undoes ``fuse_projections``."""
    for attention in model.modules():
        if isinstance(attention, Attention):
            unfuse_attention(attention)


def unfuse_attention(attention: Attention) -> None:
    """Undoes ``fuse_projections`` for one attention, if it is fused."""
    if getattr(attention, "fused_projections", False):
        for name in JOINT_OF:
            if hasattr(attention, name):
                delattr(attention, name)
        attention.fused_projections = False
        if type(attention.processor) is FusedAttnProcessor2_0:  # not if another one was set since
            _process(attention, AttnProcessor2_0())


def _process(attention: Attention, processor: Any) -> None:
    """Sets a processor; diffusers' annotation of ``set_processor`` lacks the two used here."""
    attention.set_processor(processor)


def _fuse(attention: Attention) -> bool:
    joint = "to_kv" if attention.is_cross_attention else "to_qkv"
    layers = [getattr(attention, name, None) for name in JOINT_OF[joint]]
    if len({layer.weight.shape[0] for layer in layers if isinstance(layer, nn.Linear)}) > 1:
        return False
    if any(isinstance(layer, TextProjection) for layer in layers) or not all(alike(layers[0], x) for x in layers):
        return False
    setattr(attention, joint, join_layers(layers))
    attention.fused_projections = True
    _process(attention, FusedAttnProcessor2_0())
    return True


def alike(a: Any, b: Any) -> bool:
    """Whether two modules are quantized linear layers that :func:`join_layers` can join."""
    if not all(own_class(layer) is nn.Linear and isinstance(layer.weight, MixDQTensor) for layer in (a, b)):
        return False
    return (a.bias is None) == (b.bias is None) and not difference(a.weight, b.weight)


def join_layers(layers: Sequence[Any]) -> JointLinear:
    """One layer that computes the concatenated outputs of ``layers``; their weights become views of its weight."""
    weight = joined([layer.weight for layer in layers])
    whole = JointLinear(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if layers[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    start = 0
    for layer in layers:
        end = start + layer.weight.shape[0]
        layer.weight = nn.Parameter(weight[start:end], requires_grad=False)
        start = end
    return whole.eval()
