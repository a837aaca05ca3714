"""Other diffusers models at toy size with random weights, and inputs for one call of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

TOKENS, WIDTH = 6, 12


@dataclass(frozen=True)
class Entry:
    """One model: how to build it, its latent's shape, and its keyword arguments for a latent and a text."""

    build: Callable[[], nn.Module]
    latent: tuple[int, ...]
    inputs: Callable[[Tensor, Tensor], dict[str, Any]]
    text: str
    """A layer that reads the text embedding."""


def _unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )


def _sd3(dual: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    )


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


def _sana() -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
    )


def _pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )


def _wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _plain(latent: Tensor, text: Tensor) -> dict[str, Any]:
    time = torch.full((len(latent),), 500.0)
    return {"hidden_states": latent, "encoder_hidden_states": text, "timestep": time}


def _flux_inputs(latent: Tensor, text: Tensor) -> dict[str, Any]:
    ids = {"img_ids": torch.zeros(latent.shape[1], 3), "txt_ids": torch.zeros(text.shape[1], 3)}
    return _plain(latent, text) | {"timestep": torch.ones(len(latent)), "pooled_projections": _pooled(latent), **ids}


def _pooled(latent: Tensor) -> Tensor:
    return torch.ones(len(latent), 16)


def _pixart_inputs(latent: Tensor, text: Tensor) -> dict[str, Any]:
    return _plain(latent, text) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


SD3_INPUTS: Callable[[Tensor, Tensor], dict[str, Any]] = lambda x, t: _plain(x, t) | {"pooled_projections": _pooled(x)}  # noqa: E731
ZOO = {
    "SD 1.5": Entry(
        _unet,
        (4, 8, 8),
        lambda x, t: {"sample": x, "timestep": torch.tensor(500), "encoder_hidden_states": t},
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    ),
    "SD3": Entry(_sd3(()), (4, 8, 8), SD3_INPUTS, "context_embedder"),
    "SD3.5": Entry(_sd3((0,)), (4, 8, 8), SD3_INPUTS, "context_embedder"),
    "FLUX": Entry(_flux, (16, 4), _flux_inputs, "context_embedder"),
    "SANA": Entry(_sana, (4, 8, 8), _plain, "caption_projection.linear_1"),
    "PixArt-Sigma": Entry(_pixart, (4, 8, 8), _pixart_inputs, "caption_projection.linear_1"),
    "Wan": Entry(_wan, (4, 1, 8, 8), _plain, "condition_embedder.text_embedder.linear_1"),
}


class ToyPipeline:
    """One call of the model; a picture is the first of its output's numbers as a plane. ``text(i)`` [TOKENS, WIDTH] is
    prompt i's embedding."""

    def __init__(self, entry: Entry, text: Callable[[int], Tensor]) -> None:
        torch.manual_seed(1)
        self.entry, self.text = entry, text
        self.transformer = entry.build().eval().requires_grad_(False)

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **kwargs: Any) -> SimpleNamespace:
        latent = torch.stack([torch.randn(*self.entry.latent, generator=g) for g in generator])
        text = torch.stack([self.text(int(p)) for p in prompt])
        output = self.transformer(**self.entry.inputs(latent, text), return_dict=False)[0]
        plane = output.flatten(1)[:, :64].unflatten(1, (1, 8, 8))
        return SimpleNamespace(images=plane.repeat(1, 3, 2, 2).sigmoid())
