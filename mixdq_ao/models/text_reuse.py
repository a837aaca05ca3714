"""Keys and values of the text, computed once per prompt instead of at every denoising step.

The 140 cross-attention projections of SDXL read the text embedding, which does not change while a picture is drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .text_layers import inner_unet, project, restore, text_projections


class TextReuse(nn.Module):
    """Stands in for a UNet (compiled or not) and calls its text projections only when the text has changed.

    A text is the same while it is the same tensor, not written to; diffusers' pipelines pass one tensor to every step.
    Results and gradients are those of the UNet itself: what was computed without gradients is not used with them, and
    what has some only once. Adapters and weights must not be changed meanwhile: ``forget()`` after that.
    A pipeline is saved without it: ``pipe.unet = pipe.unet.undo()`` first.
    """

    def __init__(self, unet: nn.Module) -> None:
        """Raises MixDQError unless ``unet`` is a UNet2DConditionModel whose projections get the text as it is."""
        super().__init__()
        inner = inner_unet(unet)
        self.unet, self.projections = unet, text_projections(inner)
        compiled = inner is not unet
        self._project = torch.compile(self._products, fullgraph=True) if compiled else self._products
        self._known: tuple[Tensor, int, bool] | None = None

    def _products(self, text: Tensor) -> list[Tensor]:
        return project(self._inner(), self.projections, text)

    def forget(self) -> None:
        """Has the next call compute the projections again."""
        self._known = None

    def undo(self) -> nn.Module:
        """Puts the layers back and returns the UNet."""
        restore(self._inner())
        return self.unet

    def _inner(self) -> nn.Module:
        return getattr(self.unet, "_orig_mod", self.unet)

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        text = encoder_hidden_states
        if not self._unchanged(text):
            self.projections = text_projections(self._inner())
            values = self._project(text)
            for projection, value in zip(self.projections, values, strict=True):
                projection.store(value)
            learnt = any(value.requires_grad for value in values)
            self._known = None if learnt or text.is_inference() else (text, text._version, torch.is_grad_enabled())
        return self.unet(sample, timestep, text, *args, **kwargs)

    def _unchanged(self, text: Tensor) -> bool:
        """An inference tensor does not tell when it is written to, so it is never known. Nothing is stored where
        projections were joined or taken apart meanwhile."""
        known = self._known
        same = known is not None and known[0] is text and known[1:] == (text._version, torch.is_grad_enabled())
        return same and all(projection.value is not None for projection in self.projections)

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
