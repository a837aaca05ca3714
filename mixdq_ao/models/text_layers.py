"""The layers of a UNet that read the text embedding and nothing else, made to return what was computed of it before."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..errors import MixDQError
from ..layers import reads_text

JOINT = "text_projections"
"""Name of the UNet's module that computes several of them at once (see ``fused_text``)."""


class AtHand:
    """What a joint product has computed for one reader, until it asks; no part of the module, so that compiled code may
    set and clear it."""

    def __init__(self) -> None:
        self.text: Tensor | None = None
        self.value: Tensor | None = None


class TextProjection(nn.Module):
    """A projection of the text that returns what is known of it: stored over calls, or computed with others.

    Attributes:
        layer: the projection itself.
        value: [B, T, N] stored for the text of these calls, None where nothing is.
        joint: the product that computes this projection with others and its place in it, None where there is none.
    """

    layer: Any
    value: Tensor | None
    joint: tuple[Any, int] | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.joint, self.at_hand = layer, None, AtHand()
        self.register_buffer("value", None, persistent=False)

    def forward(self, text: Tensor, *args: Any) -> Tensor:
        if self.value is not None:
            return self.value
        if self.joint is None:
            return self.layer(text, *args)
        if self.at_hand.text is not text:  # the first of this call, or what another call has left behind
            self.joint[0].hand_out(text)
        value, self.at_hand.text, self.at_hand.value = self.at_hand.value, None, None
        assert value is not None
        return value

    def store(self, value: Tensor) -> None:
        """Keeps ``value`` where the last one of its shape was: compiled code and CUDA graphs go on reading there. What
        has a gradient gets a place of its own, which is part of one graph."""
        held = self.value
        fits = held is not None and (held.shape, held.dtype, held.device) == (value.shape, value.dtype, value.device)
        if held is not None and fits and not (held.requires_grad or value.requires_grad):
            held.copy_(value)
        else:
            self.value = value.clone(memory_format=torch.contiguous_format)


def inner_unet(unet: Any) -> UNet2DConditionModel:
    """The UNet itself, compiled or not. Raises MixDQError unless its projections get the text as it is."""
    inner = getattr(unet, "_orig_mod", unet)
    if not isinstance(inner, UNet2DConditionModel):
        raise MixDQError(f"the denoiser is a {type(inner).__name__}, expected a UNet2DConditionModel")
    if inner.encoder_hid_proj is not None:
        raise MixDQError(
            "the UNet changes the text before its projections (encoder_hid_proj, as for IP-Adapter); "
            "its keys and values cannot be kept"
        )
    return inner


def _attention(inner: nn.Module, name: str) -> Any:
    return inner.get_submodule(name.rpartition(".")[0])


def text_projections(inner: nn.Module) -> list[TextProjection]:
    """Every projection of the text that the attentions call, stood in for by a :class:`TextProjection`.

    Raises:
        MixDQError: there is none.
    """
    found = {n: m for n, m in inner.named_modules() if reads_text(n) or n.endswith("attn2.to_kv")}
    found = {n: m for n, m in found.items() if n.endswith("to_kv") or not hasattr(_attention(inner, n), "to_kv")}
    found = {n: m for n, m in found.items() if not getattr(_attention(inner, n), "norm_cross", None)}
    if not found:
        raise MixDQError("the UNet has no cross-attention projections (attn2.to_k, attn2.to_v) to keep")
    stand_ins = {n: m if isinstance(m, TextProjection) else TextProjection(m) for n, m in found.items()}
    for name, stand_in in stand_ins.items():
        inner.set_submodule(name, stand_in)
    return list(stand_ins.values())


def project(inner: nn.Module, projections: list[TextProjection], text: Tensor) -> list[Tensor]:
    """What each of them gives, as few products as the UNet's joint projections allow."""
    joint = getattr(inner, JOINT, None)
    values = [] if joint is None else joint(text)
    return [p.layer(text) if p.joint is None else values[p.joint[1]] for p in projections]


def restore(inner: nn.Module) -> None:
    """Nothing is stored any more, and the layers stand in their places again unless they are computed together."""
    for name, module in list(inner.named_modules()):
        if isinstance(module, TextProjection):
            module.value = None
            if module.joint is None:
                inner.set_submodule(name, module.layer)
