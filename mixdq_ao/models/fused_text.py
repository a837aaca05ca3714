"""The text's keys and values for all cross attentions of a UNet as one product per precision.

SDXL's 140 projections read the same 77 rows: separately they are 140 small launches (70 with ``fuse_projections``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .fused_projections import alike, join_layers, unfuse_attention
from .joint_names import JOINT_TEXT
from .text_layers import TextProjection, inner_unet, restore, text_projections


class TextProjections(nn.Module):
    """The joint products of a UNet's text projections, one for each group of equal precision.

    Attributes:
        layers: one joint linear layer for each group, [sum of outputs, K].
        readers: the projections, in the order of the results of ``forward``.
    """

    def __init__(self, groups: Sequence[Sequence[TextProjection]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(join_layers(group) for group in groups)
        self.sizes = [[p.weight.shape[0] for p in group] for group in groups]
        self.readers = tuple(p for group in groups for p in group)
        for position, reader in enumerate(self.readers):
            reader.joint = self, position

    def forward(self, text: Tensor) -> list[Tensor]:
        """text [B, T, K] -> [B, T, N_i] for each reader, views of one tensor per group."""
        parts = zip(self.layers, self.sizes, strict=True)
        return [value for layer, sizes in parts for value in layer(text).split(sizes, -1)]

    def hand_out(self, text: Tensor) -> None:
        """Computes the outputs of all readers, which return them when they are called."""
        for reader, value in zip(self.readers, self(text), strict=True):
            reader.at_hand.text, reader.at_hand.value = text, value


def fuse_text_projections(unet: Any) -> tuple[int, ...]:
    """Computes the text's keys and values for all cross attentions of a UNet when the first of them is called. Works
    before or after ``torch.compile``, and combines with ``fuse_projections`` and ``reuse_text_projections`` in any
    order.

    Projections of one bit width and one input range (a plan ties those that read one tensor) become one product, BOS
    rows included. Results stay the same to the bit, and so does memory: the layers' own weights become views of the
    joint one. Other projections stay as they are. The model is saved as if it were not fused. Fuse last: adapters,
    other precisions and ``load_state_dict`` need separate layers (``unfuse_text_projections``).

    Returns how many projections each product computes. Raises MixDQError for a denoiser without such projections.
    """
    inner = inner_unet(unet)
    unfuse_text_projections(inner)
    for attention in inner.modules():
        if isinstance(attention, Attention) and attention.is_cross_attention:
            unfuse_attention(attention)  # this joint product replaces the attention's own
    groups = _grouped(text_projections(inner))
    if groups:
        inner.add_module(JOINT_TEXT, TextProjections(groups))
    else:
        restore(inner)
    return tuple(len(group) for group in groups)


def unfuse_text_projections(unet: Any) -> None:
    """Undoes ``fuse_text_projections``."""
    inner = inner_unet(unet)
    if hasattr(inner, JOINT_TEXT):
        for reader in getattr(inner, JOINT_TEXT).readers:
            reader.joint = None
        delattr(inner, JOINT_TEXT)
    restore(inner)


def _grouped(projections: list[TextProjection]) -> list[list[TextProjection]]:
    """Projections that can be joined, the largest group first."""
    groups: list[list[TextProjection]] = []
    for projection in projections:
        group = next((g for g in groups if alike(g[0], projection)), None)
        if group is not None:
            group.append(projection)
        elif alike(projection, projection):
            groups.append([projection])
    return sorted((g for g in groups if len(g) > 1), key=len, reverse=True)
