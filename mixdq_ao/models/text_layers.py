"""The layers of a UNet that read the text embedding and nothing else, made to return what was computed of it before."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..compat import uncompiled
from ..errors import MixDQError
from ..layers import reads_text
from ..mixin import mix_in
from ..mixin import restore as restore_class
from .joint_names import JOINT_TEXT


class AtHand:
    """What a joint product has computed for one reader, until it asks; no part of the module, so that compiled code may
    set and clear it."""

    def __init__(self) -> None:
        self.text: Tensor | None = None
        self.value: Tensor | None = None


class TextProjection(nn.Module):
    """A projection of the text that gives what is known of it: stored over calls, or computed with others.

    The layer itself, of another class for the while (:func:`stand_in`): its name, weight, hooks and adapters stay what
    they are, and a model is saved as if nothing had happened.

    Attributes:
        stored: [B, T, N] of the text of these calls, None where nothing is stored.
        joint: the product that computes this projection with others and its place in it, None where there is none.
    """

    weight: Any
    stored: Tensor | None
    joint: tuple[Any, int] | None
    at_hand: AtHand

    def __call__(self, text: Tensor, *args: Any) -> Tensor:
        if self.stored is not None:
            return self.stored
        if self.joint is None:
            return self.computed(text, *args)
        if self.at_hand.text is not text:  # the first of this call, or what another call has left behind
            self.joint[0].hand_out(text)
        value, self.at_hand.text, self.at_hand.value = self.at_hand.value, None, None
        assert value is not None
        return value

    def computed(self, text: Tensor, *args: Any) -> Tensor:
        """What the layer gives by itself."""
        return super().__call__(text, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Copies store nothing: torch leaves the hooks of a compiled model, which look at the text, behind."""
        state: Any = super().__getstate__()
        return {**state, "_buffers": {**self._buffers, "stored": None}}

    def store(self, value: Tensor) -> None:
        """Keeps ``value`` where the last one of its shape was: compiled code and CUDA graphs go on reading there. What
        has a gradient gets a place of its own, which is part of one graph; so does what follows inference mode."""
        held = self.stored
        if held is not None and held.is_inference() and not torch.is_inference_mode_enabled():
            held = None
        fits = held is not None and (held.shape, held.dtype, held.device) == (value.shape, value.dtype, value.device)
        if held is not None and fits and not (held.requires_grad or value.requires_grad):
            held.copy_(value)
        else:
            self.stored = value.clone(memory_format=torch.contiguous_format)


def stand_in(layer: nn.Module) -> TextProjection:
    """Makes the layer a :class:`TextProjection`, until :func:`restore`."""
    if not isinstance(layer, TextProjection):
        mix_in(layer, TextProjection, name=f"Text{type(layer).__name__}")
        assert isinstance(layer, TextProjection)
        layer.register_buffer("stored", None, persistent=False)
        layer.joint, layer.at_hand = None, AtHand()
    return layer


def inner_unet(unet: Any) -> UNet2DConditionModel:
    """The UNet itself, compiled or not. Raises MixDQError unless its projections get the text as it is."""
    inner = uncompiled(unet)
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
    """Every projection of the text that the attentions call, as a :class:`TextProjection`.

    Raises:
        MixDQError: there is none.
    """
    found = {n: m for n, m in inner.named_modules() if reads_text(n) or n.endswith("attn2.to_kv")}
    found = {n: m for n, m in found.items() if n.endswith("to_kv") or not hasattr(_attention(inner, n), "to_kv")}
    found = {n: m for n, m in found.items() if not getattr(_attention(inner, n), "norm_cross", None)}
    if not found:
        raise MixDQError("the UNet has no cross-attention projections (attn2.to_k, attn2.to_v) to keep")
    return [stand_in(layer) for layer in found.values()]


def project(inner: nn.Module, projections: list[TextProjection], text: Tensor) -> list[Tensor]:
    """What each of them gives, as few products as the UNet's joint projections allow."""
    joint = getattr(inner, JOINT_TEXT, None)
    values = [] if joint is None else joint(text)
    return [p.computed(text) if p.joint is None else values[p.joint[1]] for p in projections]


def restore(inner: nn.Module) -> None:
    """Nothing is stored any more, and layers are what they were unless they are computed together."""
    for module in inner.modules():
        if isinstance(module, TextProjection):
            module.stored = None
            if module.joint is None:
                del module.stored, module.joint, module.at_hand
                restore_class(module)
