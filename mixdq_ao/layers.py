"""The linear and convolution layers of a model: their names, MixDQ's two groups, and split points."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal

from torch import nn

from .compat import uncompiled
from .errors import QuantizationError

Group = Literal["content", "quality"]
GroupRule = Callable[[str], Group]


def check_module(model: object) -> nn.Module:
    """``model`` without the wrapper of ``torch.compile``. Raises QuantizationError unless it is an nn.Module
    (a pipeline is not)."""
    if not isinstance(model, nn.Module):
        raise QuantizationError(
            f"model is a {type(model).__name__}, expected nn.Module, as pipe.unet or pipe.transformer"
        )
    return uncompiled(model)


class JointLinear(nn.Linear):
    """Several linear layers that share an input, computed as one product.

    The original layers stay in the module tree, their weights views of this one's. Plans and files name only them.
    """


def find_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every nn.Linear and nn.Conv2d of ``model`` by name, in module order (794 in SDXL's UNet).

    Where a joint layer computes several others, those are listed and the joint one is not. Raises QuantizationError
    unless ``model`` is an nn.Module.
    """
    products = find_products(model)
    return {n: m for n, m in products.items() if not (isinstance(m, JointLinear) or _computes_others(n, products))}


JOINT_OF = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""diffusers' names of joint projections in an attention (``fuse_qkv_projections``): {joint: the layers it computes}."""


def _computes_others(name: str, names: Iterable[str]) -> bool:
    """Whether a layer is a joint projection of diffusers whose parts are still in the module tree."""
    path, _, last = name.rpartition(".")
    return last in JOINT_OF and all(f"{path}.{part}".removeprefix(".") in names for part in JOINT_OF[last])


def find_products(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """``find_layers`` with the joint layers included."""
    return {n: m for n, m in check_module(model).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


CROSS_ATTENTION = {"attn2", "cross_attn", "cross_attention"}
"""Names of cross-attention in diffusers' models."""
FEED_FORWARD = {"feed_forward", "img_mlp", "txt_mlp"}
"""Names of feed-forward modules, besides those that begin with ``ff``."""
TEXT_STREAM = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
"""Projections of the text stream in joint attention over picture and text (SD3, FLUX)."""
TEXT_EMBEDDERS = {
    "cap_embedder",
    "caption_embedder",
    "caption_projection",
    "context_embedder",
    "text_embedder",
    "text_embeddings",
    "text_proj",
    "txt_in",
}
"""Names of modules that embed the text once, for all later layers of the model."""
FIRST_OF_EMBEDDER = re.compile(
    r"(^|[.])(context_embedder([.]proj_in|[.]linear_1)?|caption_projection[.](\d+[.]linear|linear_1)|encoder_hid_proj"
    r"|text_embedder[.]linear_1|(patch_embed[.])?text_proj|txt_in([.]linear_1|[.]in_layer)?|cap_embedder[.]1"
    r"|caption_embedder[.]1|text_embeddings[.]in_layer|crossattn_proj[.]0)$"
)
"""The layer of a text embedder that reads the text encoders' output, in the models of diffusers 0.42."""
POOLED_TEXT = re.compile(r"(^|[.])(time_text_embed|add_embedding|time_embed)[.]")
"""In the names of layers that read a pooled text embedding: one vector, without a BOS row."""


def group_of(name: str) -> Group:
    """MixDQ's rule: feed-forward and cross-attention layers decide the *content* of a picture (judged by SSIM),
    all others its *quality* (judged by SQNR). Section 4.2 of arXiv 2405.17873.

    In models with joint attention, projections of the text stream are content as well, and so are layers that embed the
    text. The feed-forward layers of FLUX's single blocks are ``proj_mlp`` and ``proj_out``.
    """
    parts = name.split(".")
    content = (CROSS_ATTENTION | FEED_FORWARD | TEXT_STREAM | TEXT_EMBEDDERS) & set(parts)
    single = parts[0] == "single_transformer_blocks" and parts[-1] in ("proj_mlp", "proj_out")
    return "content" if content or single or any(p.startswith("ff") for p in parts) else "quality"


def reads_text(name: str) -> bool:
    """Whether a layer is a cross-attention projection of the text embedding (140 in SDXL)."""
    return name.endswith(("attn2.to_k", "attn2.to_v"))


def text_readers(model: nn.Module) -> frozenset[str]:
    """Layers known by name to read the text encoders' output: the model's text projection where it has one (SD3, FLUX,
    PixArt, SANA, Wan), otherwise the key and value projections of cross-attention. Calibration finds others."""
    layers = find_layers(model)
    projections = {n for n in layers if FIRST_OF_EMBEDDER.search(n) and not POOLED_TEXT.search(n)}
    return frozenset(projections or (n for n in layers if reads_text(n) and _is_cross(model, n)))


def _is_cross(model: nn.Module, name: str) -> bool:
    """Whether a projection belongs to cross-attention. In video UNets some ``attn2`` are self-attention over frames."""
    return getattr(model.get_submodule(name.rpartition(".")[0]), "is_cross_attention", True)


def split_points(model: nn.Module) -> dict[str, int]:
    """Channels of the first half of each concatenated shortcut input: {conv_shortcut name: channels}.

    An up block concatenates its hidden state with a skip connection. The split point is the number of channels of the
    hidden state, which is ``out_channels`` of the resnet (or block) before; it is read from the modules.
    """
    splits: dict[str, int] = {}
    mid = getattr(getattr(model, "mid_block", None), "resnets", None)
    channels = getattr(mid[-1], "out_channels", None) if mid is not None and len(mid) else None
    for b, block in enumerate(getattr(model, "up_blocks", None) or []):
        for r, resnet in enumerate(getattr(block, "resnets", None) or []):
            shortcut = getattr(resnet, "conv_shortcut", None)
            if channels is not None and shortcut is not None and 0 < channels < resnet.in_channels:
                splits[f"up_blocks.{b}.resnets.{r}.conv_shortcut"] = channels
            channels = getattr(resnet, "out_channels", None)  # resnet blocks of video models have no such attribute
    return splits


def in_channels(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels  # type: ignore[union-attr,return-value]
