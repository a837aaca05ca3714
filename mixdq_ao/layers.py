"""The layers of a model that can be quantized: names, groups, and split points."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from torch import nn

from .compat import uncompiled
from .errors import QuantizationError

Group = Literal["content", "quality"]
GroupRule = Callable[[str], Group]


def check_module(model: object) -> nn.Module:
    """The model itself where ``torch.compile`` wrapped it. Raises QuantizationError for a pipeline, or whatever else is
    no module."""
    if not isinstance(model, nn.Module):
        raise QuantizationError(
            f"model is a {type(model).__name__}, expected nn.Module, as pipe.unet or pipe.transformer"
        )
    return uncompiled(model)


class JointLinear(nn.Linear):
    """Linear layers of one input as one product. They stay in their places, their weights views of this one's: plans
    and files speak of them, and this is no layer of its own."""


def find_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every nn.Linear and nn.Conv2d of ``model`` by name, in module order; of joint ones the layers they compute.
    794 in SDXL's UNet."""
    products = find_products(model)
    return {n: m for n, m in products.items() if not (isinstance(m, JointLinear) or _computes_others(n, products))}


JOINT_OF = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""What diffusers' attention calls its joint projections (``fused_projections``), and the layers each computes."""


def _computes_others(name: str, names: Iterable[str]) -> bool:
    """Whether a layer is diffusers' joint one, beside those it computes or computed."""
    path, _, last = name.rpartition(".")
    return last in JOINT_OF and all(f"{path}.{part}".removeprefix(".") in names for part in JOINT_OF[last])


def find_products(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers, and those that compute several of them at once. Raises QuantizationError for what is no module."""
    return {n: m for n, m in check_module(model).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


TEXT_STREAM = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
"""The text's own projections in attention over picture and text together (SD3, FLUX)."""
TEXT_PROJECTIONS = ("context_embedder", "caption_projection.linear_1", "text_embedder.linear_1", "encoder_hid_proj")
"""Names, or their ends, of layers that read the text embedding where later ones read only what they make of it."""
POOLED_TEXT = "time_text_embed."
"""In names of layers that read one pooled embedding for the whole prompt (SD3, FLUX), which has no first row."""


def group_of(name: str) -> Group:
    """MixDQ's rule: feed-forward and cross-attention layers decide the *content* of a picture (judged by SSIM),
    all others its *quality* (judged by SQNR). Section 4.2 of arXiv 2405.17873.

    Where attention is over picture and text together, its projections of the text are content too, as are layers that
    make the model's text embedding. FLUX's single blocks have their feed-forward in ``proj_mlp`` and ``proj_out``.
    """
    parts = name.split(".")
    content = any(p == "attn2" or p.startswith("ff") or p in TEXT_STREAM for p in parts)
    single = parts[0] == "single_transformer_blocks" and parts[-1] in ("proj_mlp", "proj_out")
    text = bool({"context_embedder", "caption_projection", "text_embedder"} & set(parts))
    return "content" if content or single or text else "quality"


def reads_text(name: str) -> bool:
    """Cross-attention projections that read the text embedding and nothing else (140 in SDXL)."""
    return name.endswith(("attn2.to_k", "attn2.to_v"))


def text_readers(model: nn.Module) -> frozenset[str]:
    """Layers that read the text encoders' own rows: the model's text projection where it has one (SD3, FLUX, PixArt,
    SANA, Wan), else the keys and values of cross attention."""
    layers = find_layers(model)
    projections = {n for n in layers if n.endswith(TEXT_PROJECTIONS) and POOLED_TEXT not in n}
    return frozenset(projections or (n for n in layers if reads_text(n) and _is_cross(model, n)))


def _is_cross(model: nn.Module, name: str) -> bool:
    """Whether the attention of a projection is over another tensor. Over frames (video UNets) ``attn2`` is not."""
    return getattr(model.get_submodule(name.rpartition(".")[0]), "is_cross_attention", True)


def split_points(model: nn.Module) -> dict[str, int]:
    """Channels of the first half of each concatenated shortcut input: {conv_shortcut name: channels}.

    An up block concatenates its running hidden state with a skip connection, so the split is the number of
    channels of the former: what the previous resnet (or block) put out. Read from the modules, no list.
    """
    splits: dict[str, int] = {}
    mid = getattr(getattr(model, "mid_block", None), "resnets", None)
    channels = getattr(mid[-1], "out_channels", None) if mid is not None and len(mid) else None
    for b, block in enumerate(getattr(model, "up_blocks", None) or []):
        for r, resnet in enumerate(getattr(block, "resnets", None) or []):
            shortcut = getattr(resnet, "conv_shortcut", None)
            if channels is not None and shortcut is not None and 0 < channels < resnet.in_channels:
                splits[f"up_blocks.{b}.resnets.{r}.conv_shortcut"] = channels
            channels = getattr(resnet, "out_channels", None)  # blocks of video models hold two resnets and say nothing
    return splits


def in_channels(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels  # type: ignore[union-attr,return-value]
