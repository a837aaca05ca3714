"""The layers of a UNet that read only the text embedding: their outputs can be cached, or computed jointly."""

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
    """The output that a joint product has computed for one reader, until the reader takes it. Not a module attribute,
    so that compiled code may set and clear it."""

    def __init__(self) -> None:
        self.text: Tensor | None = None
        self.value: Tensor | None = None


class TextProjection(nn.Module):
    """A text projection whose output is cached or computed jointly.

    It is the original layer with its class temporarily replaced (:func:`stand_in`, :func:`restore`): name, weight,
    hooks and adapters stay, and the model is saved as before.

    Attributes:
        stored: the cached output [B, T, N], or None.
        joint: the joint product that computes this projection, and the projection's index in it, or None.
        at_hand: the output of the joint product that this projection has not yet returned.
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
        if self.at_hand.text is not text:  # the first reader of this call, or a leftover of an interrupted one
            self.joint[0].hand_out(text)
        value, self.at_hand.text, self.at_hand.value = self.at_hand.value, None, None
        assert value is not None
        return value

    def computed(self, text: Tensor, *args: Any) -> Tensor:
        """The layer's own output."""
        return super().__call__(text, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the cache out: a copy of a compiled model lacks the hook that keeps the cache up to date."""
        state: Any = super().__getstate__()
        return {**state, "_buffers": {**self._buffers, "stored": None}}

    def store(self, value: Tensor) -> None:
        """Caches ``value``, in the memory of the last one if shapes agree: compiled code and CUDA graphs read from it.
        Memory is new for a value with a gradient, which belongs to one graph, and where the last one was an inference
        tensor."""
        held = self.stored
        if held is not None and held.is_inference() and not torch.is_inference_mode_enabled():
            held = None
        fits = held is not None and (held.shape, held.dtype, held.device) == (value.shape, value.dtype, value.device)
        if held is not None and fits and not (held.requires_grad or value.requires_grad):
            held.copy_(value)
        else:
            self.stored = value.clone(memory_format=torch.contiguous_format)


def stand_in(layer: nn.Module) -> TextProjection:
    """Changes the class of ``layer`` to a :class:`TextProjection`, until :func:`restore`."""
    if not isinstance(layer, TextProjection):
        mix_in(layer, TextProjection, name=f"Text{type(layer).__name__}")
        assert isinstance(layer, TextProjection)
        layer.register_buffer("stored", None, persistent=False)
        layer.joint, layer.at_hand = None, AtHand()
    return layer


def inner_unet(unet: Any) -> UNet2DConditionModel:
    """The UNet without the wrapper of ``torch.compile``. Raises MixDQError for another model, or one that changes the
    text before its projections."""
    inner = uncompiled(unet)
    if not isinstance(inner, UNet2DConditionModel):
        raise MixDQError(
            f"the denoiser is a {type(inner).__name__}, expected a UNet2DConditionModel, whose projections "
            "read the text embedding itself"
        )
    if inner.encoder_hid_proj is not None:
        raise MixDQError(
            "the UNet changes the text before its projections (encoder_hid_proj, as for IP-Adapter); "
            "its keys and values cannot be kept"
        )
    return inner


def _attention(inner: nn.Module, name: str) -> Any:
    return inner.get_submodule(name.rpartition(".")[0])


def text_projections(inner: nn.Module) -> list[TextProjection]:
    """Every text projection that the attentions call, changed to a :class:`TextProjection`.

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
    """The output of each projection, by joint products where the UNet has them."""
    joint = getattr(inner, JOINT_TEXT, None)
    values = [] if joint is None else joint(text)
    return [p.computed(text) if p.joint is None else values[p.joint[1]] for p in projections]


def restore(inner: nn.Module) -> None:
    """Drops the caches, and restores the class of projections that are not computed jointly."""
    for module in inner.modules():
        if isinstance(module, TextProjection):
            module.stored = None
            if module.joint is None:
                del module.stored, module.joint, module.at_hand
                restore_class(module)
