"""ImageReward's network, built from transformers' BLIP; loads the published weights by their original names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MixDQError
from .weights import fill, read_weights

MLP = (1024, 128, 64, 16, 1)
"""Outputs of the reward's linear layers (Xu et al. 2023; no activation between them)."""
VISION_EPS = 1e-6
"""Epsilon of the layer norms in BLIP's picture encoder; differs from transformers' default."""
RENAMED = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.(\d+)\.", r"reward.\1."),
)
"""(pattern of a published name, name in ``RewardModel``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a BLIP; the defaults are ImageReward's."""

    image: int = 224
    patch: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_inner: int = 3072
    vocabulary: int = 30524


class RewardModel(nn.Module):
    """BLIP's text encoder with cross attention to the picture; linear layers map its first row to one number."""

    def __init__(self, shape: Shape | None = None) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.shape = s = shape or Shape()
        vision: dict[str, Any] = {"image_size": s.image, "patch_size": s.patch, "layer_norm_eps": VISION_EPS}
        vision |= {"hidden_size": s.vision_width, "intermediate_size": 4 * s.vision_width}
        vision |= {"num_hidden_layers": s.vision_layers, "num_attention_heads": s.vision_heads}
        text: dict[str, Any] = {"vocab_size": s.vocabulary, "encoder_hidden_size": s.vision_width}
        text |= {"hidden_size": s.text_width, "intermediate_size": s.text_inner}
        text |= {"num_hidden_layers": s.text_layers, "num_attention_heads": s.text_heads}
        self.vision: Any = BlipVisionModel(BlipVisionConfig(**vision))
        self.text: Any = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        widths = (s.text_width, *MLP)
        # dropout, inactive here, keeps the indices in the published names
        layers = [nn.Linear(i, o) for i, o in zip(widths, MLP, strict=False)]
        with_dropout = [m for n in layers[:3] for m in (n, nn.Dropout())] + layers[3:]
        self.reward = nn.Sequential(*with_dropout)
        self.eval()

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pixels [B, 3, S, S], token ids and mask [B, L] to one number each, [B]."""
        picture = self.vision(pixel_values=pixels).last_hidden_state
        seen = torch.ones(picture.shape[:-1], dtype=torch.long, device=picture.device)
        rows = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=picture, encoder_attention_mask=seen
        ).last_hidden_state
        return self.reward(rows[:, 0])[:, 0]


def load_reward(path: Path, shape: Shape | None = None) -> RewardModel:
    """The network with the weights of a safetensors file under the published names (ImageReward.pt, converted).

    Raises MixDQError naming the file, and a tensor that is missing or of another shape.
    """
    with torch.device("meta"):
        model = RewardModel(shape)
    state = renamed(read_weights(path, "ImageReward's weights"))
    model.to_empty(device="cpu")
    fill(
        model, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path
    )
    for name, buffer in model.named_buffers():  # not among the weights
        buffer.copy_(_positions(name, buffer))
    return model


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames published tensors to ``RewardModel``'s names; unused ones keep their names."""
    return {_rename(name): tensor for name, tensor in state.items()}


def _rename(name: str) -> str:
    for pattern, other in RENAMED:
        name, count = re.subn(pattern, other, name)
        if count:
            return name
    return name


def _positions(name: str, buffer: Tensor) -> Tensor:
    if not name.endswith("position_ids"):
        raise MixDQError(f"buffer {name!r} of BLIP is unknown; this release of transformers is not supported")
    return torch.arange(buffer.shape[-1]).expand(buffer.shape)
