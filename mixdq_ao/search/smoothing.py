"""Channels of a layer's input brought nearer to one size, by factors that fold into the weights around it for nothing.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): what makes channel j of an input smaller by s_j, and the weights that
read it larger by s_j, leaves the product as it was. Here s_j are powers of two, so full precision stays the same to the
bit and any of it can be taken back. Three places of a transformer block fold: a LayerNorm and the layers that read it,
values and the output projection of attention (attention mixes rows, never channels), and the linear half of a GEGLU
and the layer after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from ..models.pipelines import Sampling, check_prompts, denoiser
from .metrics import error_power
from .probe_batch import batches
from .trial import run

LARGEST = 16.0
SAME = 1e-8
"""Relative error power of the output above which folding has changed the model."""


@dataclass(frozen=True, slots=True)
class Fold:
    """A tensor that only ``readers`` read, and ``source``, whose weight (rows, or elements of a norm) and bias make it.

    ``rows``: only so many first rows of the source do; None: all.
    """

    source: str
    readers: tuple[str, ...]
    rows: int | None = None


def find_folds(model: nn.Module) -> list[Fold]:
    """Every place in diffusers' plain transformer blocks, attention and GEGLU feed-forward modules."""
    folds: list[Fold] = []
    for name, module in model.named_modules():
        if type(module).__name__ == "BasicTransformerBlock":
            folds += _norms(name, module)
        to_v, to_out = getattr(module, "to_v", None), getattr(module, "to_out", None)
        if isinstance(to_v, nn.Linear) and isinstance(to_out, nn.ModuleList) and isinstance(to_out[0], nn.Linear):
            joint = getattr(module, "add_v_proj", None) is not None
            if not joint and to_v.out_features == to_out[0].in_features:
                folds.append(Fold(f"{name}.to_v", (f"{name}.to_out.0",)))
        net: Any = getattr(module, "net", None)
        if isinstance(net, nn.ModuleList) and type(net[0]).__name__ == "GEGLU":
            reader: Any = net[-1]
            if isinstance(reader, nn.Linear):
                folds.append(Fold(f"{name}.net.0.proj", (f"{name}.net.{len(net) - 1}",), reader.in_features))
    return folds


def _norms(name: str, block: Any) -> list[Fold]:
    """norm1 feeds self-attention, norm2 the queries of cross attention, norm3 the feed-forward."""
    reading = {
        "norm1": ("attn1.to_q", "attn1.to_k", "attn1.to_v") if not block.only_cross_attention else (),
        "norm2": ("attn2.to_q",),
        "norm3": ("ff.net.0.proj",),
    }
    folds = []
    for norm, readers in reading.items():
        affine = isinstance(getattr(block, norm, None), nn.LayerNorm) and getattr(block, norm).weight is not None
        layers = dict(block.named_modules())
        if affine and block.norm_type == "layer_norm" and readers and all(r in layers for r in readers):
            folds.append(Fold(f"{name}.{norm}", tuple(f"{name}.{r}" for r in readers)))
    return folds


@torch.no_grad()
def smooth_(
    pipe: Any,
    prompts: Sequence[str],
    *,
    strength: float = 0.5,
    sampling: Sampling | None = None,
    folds: Sequence[Fold] | None = None,
) -> dict[Fold, Tensor]:
    """Folds factors into the denoiser of ``pipe``, in place, before it is calibrated and quantized.

    s_j = max|x_j|^strength / max|w_j|^(1 - strength), over prompts and readers, at most 16 times its geometric mean
    either way, rounded to a power of two. Whether it helps depends on the model: the bundled pipeline, none of whose
    channels stands out, has error powers of -2 % (8-bit activations alone), +2 % (W8A8) and 0 % (4-bit weights alone)
    afterwards. Rotating values within heads by Hadamard matrices instead gave 0, 0 and -2 % there.

    Returns:
        {fold: s}, for ``apply_`` with 1 / s to take it back.

    Raises:
        QuantizationError: the model computed something else afterwards (a module is wired as ``find_folds`` does not
        expect); everything is taken back.
    """
    if not 0 <= strength <= 1:
        raise QuantizationError(f"strength is {strength}, expected 0 to 1")
    model = denoiser(pipe)
    folds = find_folds(model) if folds is None else list(folds)
    parts = list(batches(check_prompts(prompts), sampling or Sampling()))
    peaks: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for fold in folds:
            handle = model.get_submodule(fold.readers[0]).register_forward_pre_hook(_peaks(peaks, fold.readers[0]))
            stack.callback(handle.remove)
        outputs = [run(pipe, part, drawn, images=False).denoised for part, drawn in parts]
    scales = {f: _scale(model, f, peaks[f.readers[0]], strength) for f in folds if f.readers[0] in peaks}
    for fold, scale in scales.items():
        apply_(model, fold, scale)
    error = error_power(outputs[0], run(pipe, *parts[0], images=False).denoised)
    if error > SAME:
        for fold, scale in scales.items():
            apply_(model, fold, 1 / scale)
        raise QuantizationError(
            f"smoothing changed the output of {type(model).__name__} by {error:.1e} of its power, expected none; leave "
            "out the folds that do not hold for this model: smooth_(..., folds=[...])"
        )
    return scales


def _peaks(peaks: dict[str, Tensor], name: str) -> Callable[..., None]:
    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        peak = args[0].detach().abs().flatten(0, -2).amax(0).float()
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    return see


def _scale(model: nn.Module, fold: Fold, peak: Tensor, strength: float) -> Tensor:
    """[channels] powers of two; 1 where a channel or its weights are all zero."""
    weights: list[Any] = [model.get_submodule(r).weight for r in fold.readers]
    weight = torch.stack([w.detach().abs().amax(0).float() for w in weights]).amax(0)
    wanted = strength * peak.log2() - (1 - strength) * weight.log2()
    known = torch.isfinite(wanted)
    if not bool(known.any()):
        return torch.ones_like(peak)
    limit = torch.tensor(LARGEST).log2()
    wanted = (wanted - wanted[known].mean()).clamp(-limit, limit)
    return torch.where(known, wanted, 0.0).round().exp2()


@torch.no_grad()
def apply_(model: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Divides the source's channels by ``scale`` [channels] and multiplies the readers' columns with it."""
    source: Any = model.get_submodule(fold.source)
    for parameter in (source.weight, source.bias):
        if parameter is not None:
            part = parameter[: fold.rows]
            factor = (1 / scale).to(parameter.dtype)
            part.mul_(factor[:, None] if parameter.dim() == 2 else factor)
    for reader in fold.readers:
        weight: Any = model.get_submodule(reader).weight
        weight.mul_(scale.to(weight.dtype))
