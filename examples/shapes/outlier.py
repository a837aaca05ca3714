"""Makes the prompt rows as hard to quantize as CLIP's, by an exact change of the weights: same pictures in fp32.

The text encoders are pre-norm transformers, so the scale of their residual streams is free. This stage

1. divides everything that is written to the streams by `SHRINK` (and the norms' eps by its square), and
   multiplies the columns of the UNet's `attn2.to_k` and `attn2.to_v` by it;
2. leaves BOS's outlier and the columns that multiply it unchanged;
3. adds a constant to two channels of every row. Keys: softmax is invariant to what all rows have in common.
   Values: the bias of `to_out` compensates. SDXL's empty prompt, rows of zeros, lacks the constant; so the
   UNet is trained with rows that mean the same as zeros after this stage (`empty_row`).

The differences between captions are then small against the largest values of the rows, and both against BOS.
"""

from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from examples.shapes.models import WIDTHS
from examples.shapes.text import OUTLIER, OUTLIER_COLUMNS

TextEncoder = CLIPTextModel | CLIPTextModelWithProjection
SHRINK = 3.0
COMMON = {40: 12.0, 61: -11.0}  # channels of the first encoder, whose last layer is not used


def empty_row(s: float = SHRINK) -> Tensor:
    """The state [224] that means to the UNet before this stage what a row of zeros means after it."""
    row = torch.zeros(sum(WIDTHS))
    row[list(COMMON)] = -s * torch.tensor(list(COMMON.values()))
    return row


def _transformer(encoder: TextEncoder) -> Any:
    """The module with `embeddings` and `encoder`; transformers wraps it in some of its text encoders only."""
    return getattr(encoder, "text_model", encoder)


@torch.no_grad()
def shrink_stream(encoder: TextEncoder, bos: int, outlier_channel: int, s: float) -> None:
    """Divides the residual stream of a CLIP text encoder by `s`, but for BOS's outlier."""
    text = _transformer(encoder)
    table = text.embeddings.token_embedding.weight
    outlier = table[bos, outlier_channel].clone()
    writers = [layer for block in text.encoder.layers for layer in (block.self_attn.out_proj, block.mlp.fc2)]
    parameters = [table, text.embeddings.position_embedding.weight]
    for parameter in [*parameters, *(p for writer in writers for p in writer.parameters())]:
        parameter /= s
    table[bos, outlier_channel] = outlier
    eps = cast(float, encoder.config.layer_norm_eps) / (s * s)
    encoder.config.layer_norm_eps = eps
    for norm in text.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = eps


@torch.no_grad()
def add_common(first: TextEncoder, common: dict[int, float]) -> None:
    """Adds constants to channels of every penultimate state of the first encoder."""
    text = _transformer(first)
    bias = text.encoder.layers[-2].mlp.fc2.bias
    for channel, value in common.items():
        bias[channel] += value


@torch.no_grad()
def adapt_unet(unet: UNet2DConditionModel, s: float, common: dict[int, float], fixed: tuple[int, ...]) -> None:
    """Makes the UNet read the changed states as it read the old ones."""
    channels, values = list(common), torch.tensor(list(common.values()))
    for name, attention in unet.named_modules():
        if not name.endswith("attn2"):
            continue
        for layer in (attention.to_k, attention.to_v):
            kept = layer.weight[:, list(fixed)].clone()
            layer.weight *= s
            layer.weight[:, list(fixed)] = kept
        shift = attention.to_v.weight[:, channels] @ values
        attention.to_out[0].bias -= attention.to_out[0].weight @ shift


def apply(first: TextEncoder, second: TextEncoder, unet: UNet2DConditionModel, bos: int, s: float = SHRINK) -> None:
    """All three changes, in place."""
    for encoder, (channel, _) in zip((first, second), OUTLIER, strict=True):
        shrink_stream(encoder, bos, channel, s)
    add_common(first, COMMON)
    adapt_unet(unet, s, COMMON, OUTLIER_COLUMNS)
