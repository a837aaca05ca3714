"""A CLIP of a few thousand weights with its tokenizer, and a pipeline that draws without a network."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor


class Painter:
    """Stands in for a pipeline: each picture is noise of its generator, shifted by its prompt. Counts what it draws."""

    def __init__(self) -> None:
        self.drawn: list[str] = []
        self.dies_after: int | None = None

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **options: object) -> SimpleNamespace:
        if self.dies_after is not None and len(self.drawn) >= self.dies_after:
            raise KeyboardInterrupt
        self.drawn += prompt
        noise = torch.stack([torch.rand(3, 24, 24, generator=g) for g in generator])
        shift = torch.tensor([len(p) / 50 for p in prompt]).view(-1, 1, 1, 1)
        return SimpleNamespace(images=(noise * 0.7 + shift).clamp(0, 1))


@pytest.fixture
def painter() -> Painter:
    return Painter()


@pytest.fixture(scope="session")
def clip(shapes):
    """Random weights, the bundled tokenizer; pictures of 32 x 32."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    torch.manual_seed(4)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(shapes.PIPELINE / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = shared | {"vocab_size": len(tokenizer), "max_position_embeddings": 77} | ids
    config = CLIPConfig(text_config=text, vision_config=shared | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    return SimpleNamespace(model=CLIPModel(config).eval(), tokenizer=tokenizer)


def pictures(count: int, *, side: int = 24, seed: int = 0) -> Tensor:
    """uint8 [count, 3, side, side]."""
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
