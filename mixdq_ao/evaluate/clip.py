"""CLIPScore: the cosine similarity of picture and prompt in CLIP's embedding space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .metric import Batch, MeanMetric, Rows, column
from .resize import clip_pixels
from .weights import pretrained

DEFAULT = "openai/clip-vit-large-patch14"


class CLIPScore(MeanMetric):
    """Mean over pictures of ``100 max(cos(picture, prompt), 0)`` in CLIP's embedding space.

    Hessel et al. 2021, equation 1, with the factor 100 instead of their 2.5, as usual for text-to-image models; divide
    by 100 to compare with papers that print the cosine. Prompts are truncated to CLIP's 77 tokens.

    Args:
        model, tokenizer: transformers' CLIPModel and its tokenizer.
        source: name or directory that they were loaded from.
    """

    name = "clip"
    better = "higher"
    needs = frozenset({"prompts"})

    def __init__(self, model: Any, tokenizer: Any, *, source: str = "") -> None:
        super().__init__()
        self._model, self._tokenizer, self._source = model.eval(), tokenizer, source
        self._size: int = model.config.vision_config.image_size

    @classmethod
    def load(cls, name: str = DEFAULT, device: str = "cpu") -> CLIPScore:
        """Loads from a directory or by a hub name. Raises MixDQError if that fails."""
        from transformers import AutoTokenizer, CLIPModel

        model: Any = pretrained(CLIPModel, name, "CLIPScore")
        return cls(model.to(device), pretrained(AutoTokenizer, name, "CLIPScore"), source=name)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"model": self._source}

    @torch.no_grad()
    def measure(self, batch: Batch) -> Rows:
        device = next(self._model.parameters()).device
        texts = self._tokenizer(
            list(batch.prompts or ()), padding=True, truncation=True, max_length=self._longest(), return_tensors="pt"
        ).to(device)
        pixels = clip_pixels(batch.images, self._size).to(device, self._model.dtype)
        text = self._model.get_text_features(**texts).pooler_output.double()
        image = self._model.get_image_features(pixel_values=pixels).pooler_output.double()
        return column(100 * nn.functional.cosine_similarity(image, text).clamp_min(0))

    def _longest(self) -> int:
        return self._model.config.text_config.max_position_embeddings
