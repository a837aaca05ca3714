"""Caches the keys and values of the text: computed once per prompt instead of in every denoising step.

The 140 cross-attention projections of SDXL read the text embedding, which is the same in all steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..compat import uncompiled
from .joint_names import TEXT_REUSE
from .pipelines import denoiser
from .text_layers import inner_unet, project, restore, text_projections


class TextReuse:
    """A forward pre-hook of a UNet (compiled or not) that computes its text projections when the text has changed.

    The text is unchanged if it is the same tensor and was not written to; diffusers' pipelines pass one tensor to every
    step. A model prepared for a schedule computes its projections again when the level changes.
    Results and gradients are those of the UNet itself: values computed without gradients are not used with them, and
    values with gradients are used only once.
    """

    def __init__(self, unet: nn.Module, inner: UNet2DConditionModel) -> None:
        self.inner = inner
        self._find()
        self.project = self._products if unet is inner else torch.compile(self._products, fullgraph=True)
        self.known: tuple[Tensor, int, bool, str | None] | None = None
        self.hook = unet.register_forward_pre_hook(self, with_kwargs=True)

    def _find(self) -> None:
        """Finds the current projections, and for a model prepared for a schedule one with a level, which all share."""
        self.projections = text_projections(self.inner)
        self.leveled: Any = next((p for p in self.projections if hasattr(p, "level")), None)

    def _products(self, text: Tensor) -> list[Tensor]:
        return project(self.inner, self.projections, text)

    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """torch's forward pre-hook; sample, timestep and encoder_hidden_states [B, T, K] by place or by name."""
        text = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        if text is None or self._unchanged(text):
            return
        offload = getattr(unet, "_hf_hook", None)
        if offload is not None:  # accelerate moves the weights in the UNet's forward only
            offload.pre_forward(unet, *args, **kwargs)
        self.known = None  # in case an exception interrupts storing
        self._find()
        values = self.project(text)
        for projection, value in zip(self.projections, values, strict=True):
            projection.store(value)
        learnt = any(value.requires_grad for value in values)
        if not (learnt or text.is_inference()):
            self.known = text, text._version, torch.is_grad_enabled(), self._level()

    def _unchanged(self, text: Tensor) -> bool:
        """Whether the cache is valid for ``text``. Inference tensors have no version counter, so they are never known.
        Projections that were fused or unfused meanwhile have no cache."""
        known = self.known
        if known is None or known[0] is not text:
            return False
        now = text._version, torch.is_grad_enabled(), self._level()
        return known[1:] == now and all(projection.stored is not None for projection in self.projections)

    def _level(self) -> str | None:
        """The current level of a model prepared for a schedule, on which projections depend; None for others."""
        return None if self.leveled is None else self.leveled.level

    def end(self) -> None:
        """Removes the hook and the cache."""
        self.hook.remove()
        restore(self.inner)
        delattr(self.inner, TEXT_REUSE)


def reuse_text_projections(pipe: Any) -> Any:
    """Makes ``pipe.unet`` compute its text projections once per prompt. Call it before or after ``torch.compile``.

    The cache takes 2 x 77 x channels of every cross attention per prompt of a batch. It is not saved with the model. A
    copy of a compiled model computes the projections in every call until this is called for it.
    Adapters and weights must not change meanwhile; ``forget_text_projections(pipe)`` ends it.

    Returns ``pipe``. Raises MixDQError for a denoiser without such projections.
    """
    inner = inner_unet(denoiser(pipe))
    known = getattr(inner, TEXT_REUSE, None)
    if not any(hook is known for unet in (inner, pipe.unet) for hook in unet._forward_pre_hooks.values()):
        setattr(inner, TEXT_REUSE, TextReuse(pipe.unet, inner))
    return pipe


def forget_text_projections(pipe: Any) -> Any:
    """Ends ``reuse_text_projections`` and drops the cache. Returns ``pipe``."""
    reuse = getattr(uncompiled(pipe.unet), TEXT_REUSE, None)
    if reuse is not None:
        reuse.end()
    return pipe
