"""Keys and values of the text, computed once per prompt instead of at every denoising step.

The 140 cross-attention projections of SDXL read the text embedding, which does not change while a picture is drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..errors import MixDQError
from ..layers import reads_text


class TextProjection(nn.Module):
    """A projection of the text that returns what it stored of the text at hand."""

    value: Tensor | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("value", None, persistent=False)

    def forward(self, text: Tensor, *args: Any) -> Tensor:
        return self.layer(text, *args) if self.value is None else self.value

    def store(self, value: Tensor) -> None:
        """Keeps ``value`` where the last one of its shape was: compiled code and CUDA graphs go on reading there."""
        held = self.value
        if held is not None and (held.shape, held.dtype, held.device) == (value.shape, value.dtype, value.device):
            held.copy_(value)
        else:
            self.value = value.clone()


class TextReuse(nn.Module):
    """Stands in for a UNet (compiled or not) and calls its text projections only when the text has changed.

    A text is the same while it is the same tensor, not written to; diffusers' pipelines pass one tensor to every step.
    Results are those of the UNet itself. Adapters and weights must not be changed meanwhile: ``forget()`` after that.
    """

    def __init__(self, unet: nn.Module) -> None:
        """Raises MixDQError unless ``unet`` is a UNet2DConditionModel whose projections get the text as it is."""
        super().__init__()
        inner = getattr(unet, "_orig_mod", unet)
        if not isinstance(inner, UNet2DConditionModel):
            raise MixDQError(f"the denoiser is a {type(inner).__name__}, expected a UNet2DConditionModel")
        if inner.encoder_hid_proj is not None:
            raise MixDQError(
                "the UNet changes the text before its projections (encoder_hid_proj, as for IP-Adapter); "
                "its keys and values cannot be kept"
            )
        names = [n for n, m in inner.named_modules() if reads_text(n) and not isinstance(m, TextProjection)]
        if not names:
            raise MixDQError("the UNet has no cross-attention projections (attn2.to_k, attn2.to_v) to keep")
        self.unet, self.projections = unet, [TextProjection(inner.get_submodule(n)) for n in names]
        for name, projection in zip(names, self.projections, strict=True):
            inner.set_submodule(name, projection)
        compiled = inner is not unet
        self._project = torch.compile(self._products, fullgraph=True) if compiled else self._products
        self._known: tuple[Tensor, int] | None = None

    def _products(self, text: Tensor) -> list[Tensor]:
        return [projection.layer(text) for projection in self.projections]

    def forget(self) -> None:
        """Has the next call compute the projections again."""
        self._known = None

    def undo(self) -> nn.Module:
        """Puts the layers back and returns the UNet."""
        inner = getattr(self.unet, "_orig_mod", self.unet)
        for name, module in list(inner.named_modules()):
            if isinstance(module, TextProjection):
                inner.set_submodule(name, module.layer)
        return self.unet

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        text = encoder_hidden_states
        if not self._unchanged(text):
            for projection, value in zip(self.projections, self._project(text), strict=True):
                projection.store(value)
            self._known = None if text.is_inference() else (text, text._version)
        return self.unet(sample, timestep, text, *args, **kwargs)

    def _unchanged(self, text: Tensor) -> bool:
        """An inference tensor does not tell when it is written to, so it is never known."""
        known = self._known
        return known is not None and known[0] is text and known[1] == text._version

    def __getattr__(self, name: str) -> Any:
        """``config``, ``dtype`` and whatever else a pipeline asks its UNet for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)


def reuse_text_projections(pipe: Any) -> Any:
    """Wraps ``pipe.unet``, before or after ``torch.compile``, in a :class:`TextReuse`; returns ``pipe``.

    Keys and values of the text then take memory for one batch of prompts: 2 x 77 x channels of every cross attention.
    ``pipe.unet = pipe.unet.undo()`` ends it. Raises MixDQError for a denoiser without text projections of that kind.
    """
    if isinstance(pipe.unet, TextReuse):
        return pipe
    pipe.unet = TextReuse(pipe.unet)
    return pipe
