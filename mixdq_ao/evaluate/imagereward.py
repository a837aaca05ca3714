"""ImageReward: a network's prediction of human preference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .blip import RewardModel, load_reward
from .metric import Batch, MeanMetric, Rows, column
from .resize import clip_pixels
from .weights import digest_of, pretrained

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the network's output on its training data, as published with the weights."""
LONGEST = 35
"""Number of tokens that prompts are truncated or padded to, as in the network's training."""
TOKENIZER = "google-bert/bert-base-uncased"


class ImageReward(MeanMetric):
    """Mean over pictures of ImageReward (Xu et al. 2023, "ImageReward: learning and evaluating human preferences").

    Args:
        model: the network.
        tokenizer: BERT's, uncased.
        source: identifies the weights, as text.
    """

    name = "imagereward"
    better = "higher"
    needs = frozenset({"prompts"})

    def __init__(self, model: RewardModel, tokenizer: Any, *, source: str = "") -> None:
        super().__init__()
        self._model, self._tokenizer, self._source = model.eval(), tokenizer, source

    @classmethod
    def load(cls, weights: Path, tokenizer: str = TOKENIZER, device: str = "cpu") -> ImageReward:
        """Loads the published weights from a safetensors file, and the tokenizer from a directory or by a hub name."""
        from transformers import AutoTokenizer

        model = load_reward(weights).to(device)
        return cls(model, pretrained(AutoTokenizer, tokenizer, "ImageReward"), source=digest_of(weights))

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"weights": self._source}

    @torch.no_grad()
    def measure(self, batch: Batch) -> Rows:
        device = next(self._model.parameters()).device
        texts = self._tokenizer(
            list(batch.prompts or ()), padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(device)
        pixels = clip_pixels(batch.images, self._model.shape.image).to(device)
        found = self._model(pixels, texts["input_ids"], texts["attention_mask"])
        return column((found.double() - MEAN) / STD)
