"""Keys and values of the text, computed once per prompt instead of at every denoising step.

The 140 cross-attention projections of SDXL read the text embedding, which does not change while a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..compat import uncompiled
from .joint_names import TEXT_REUSE
from .text_layers import inner_unet, project, restore, text_projections


class TextReuse:
    """Looks at the text before each call of a UNet (compiled or not), and has its projections computed when it is
    another one.

    A text is the same while it is the same tensor, not written to; diffusers' pipelines pass one tensor to every step.
    A model prepared for a schedule computes its projections again where the level changes.
    Results and gradients are those of the UNet itself: what was computed without gradients is not used with them, and
    what has some only once.
    """

    def __init__(self, unet: nn.Module, inner: UNet2DConditionModel) -> None:
        self.inner = inner
        self._find()
        self.project = self._products if unet is inner else torch.compile(self._products, fullgraph=True)
        self.known: tuple[Tensor, int, bool, str | None] | None = None
        self.hook = unet.register_forward_pre_hook(self, with_kwargs=True)

    def _find(self) -> None:
        """The projections as they are now, and one that has a level, of a model prepared for a schedule: all are at the
        same one."""
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
        if offload is not None:  # accelerate brings the weights when the UNet's own forward is called
            offload.pre_forward(unet, *args, **kwargs)
        self.known = None  # should storing be interrupted
        self._find()
        values = self.project(text)
        for projection, value in zip(self.projections, values, strict=True):
            projection.store(value)
        learnt = any(value.requires_grad for value in values)
        if not (learnt or text.is_inference()):
            self.known = text, text._version, torch.is_grad_enabled(), self._level()

    def _unchanged(self, text: Tensor) -> bool:
        """An inference tensor does not tell when it is written to, so it is never known. Nothing is stored where
        projections were joined or taken apart meanwhile."""
        known = self.known
        if known is None or known[0] is not text:
            return False
        now = text._version, torch.is_grad_enabled(), self._level()
        return known[1:] == now and all(projection.stored is not None for projection in self.projections)

    def _level(self) -> str | None:
        """Of a model prepared for a schedule, whose projections give something else at each level."""
        return None if self.leveled is None else self.leveled.level

    def end(self) -> None:
        """The projections compute at every call again."""
        self.hook.remove()
        restore(self.inner)
        delattr(self.inner, TEXT_REUSE)


def reuse_text_projections(pipe: Any) -> Any:
    """Has ``pipe.unet`` compute its projections of the text once per prompt; before or after ``torch.compile``.

    They take memory for one batch of prompts: 2 x 77 x channels of every cross attention. The model is saved as ever. A
    copy of a compiled one computes them at every call until this is called with it.
    Adapters and weights must not be changed meanwhile; ``forget_text_projections(pipe)`` ends it.

    Returns ``pipe``. Raises MixDQError for a denoiser without text projections of that kind.
    """
    inner = inner_unet(getattr(pipe, "unet", None))
    known = getattr(inner, TEXT_REUSE, None)
    if not any(hook is known for unet in (inner, pipe.unet) for hook in unet._forward_pre_hooks.values()):
        setattr(inner, TEXT_REUSE, TextReuse(pipe.unet, inner))
    return pipe


def forget_text_projections(pipe: Any) -> Any:
    """Ends ``reuse_text_projections``; nothing of the text is kept. Returns ``pipe``."""
    reuse = getattr(uncompiled(pipe.unet), TEXT_REUSE, None)
    if reuse is not None:
        reuse.end()
    return pipe
