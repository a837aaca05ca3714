"""Smoothing and rotation: scale or rotate the channels of a tensor between two layers, and fold that into the weights
around it. The model computes the same function, but with values that are easier to round.

    x -> R (x / s),   W -> W diag(s) R^T        s: powers of two (``smoothing``); R: Hadamard blocks (``rotation``)

Channels can be scaled in three places of a transformer block: between a LayerNorm and the layers that read it, between
values and the output projection of attention (attention mixes rows, never channels), and between the linear half of a
GEGLU and the layer after it. Between values and output projection channels can also be rotated, within a head. Scaling:
SmoothQuant (arXiv 2211.10438); rotation: QuaRot (arXiv 2404.00456).

A LayerPlan gives smoothing and rotation of its layer's input; the module that produces the input is found in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError, QuantizationError
from ..layer_plan import SMOOTHING, LayerPlan
from .fake import FakeQuantConv2d, FakeQuantLinear
from .hadamard import hadamard, rotated
from .tensor import is_quantized


@dataclass(frozen=True, slots=True)
class Fold:
    """A tensor that ``source`` alone produces and ``readers`` alone consume.

    Attributes:
        source: a linear layer or a norm.
        readers: linear layers.
        rows: only the first so many output rows of the source produce the tensor (None: all).
        head: channels per attention head if the tensor is the values; None forbids rotation.
    """

    source: str
    readers: tuple[str, ...]
    rows: int | None = None
    head: int | None = None


@dataclass(frozen=True, slots=True)
class Folding:
    """Smoothing and rotation of one tensor, as in a LayerPlan; false if there is neither."""

    smoothing: str | None = None
    rotation: int | None = None

    @classmethod
    def of(cls, layer: Any) -> Folding:
        """The folding recorded on a LayerPlan or LayerCalibration."""
        return cls(layer.smoothing, layer.rotation)

    def __bool__(self) -> bool:
        return self.smoothing is not None or self.rotation is not None

    def smoothed_back(self) -> Folding:
        """The folding that undoes the smoothing."""
        return Folding(None if self.smoothing is None else as_smoothing([-p for p in exponents(self.smoothing)]))


def find_folds(model: nn.Module) -> list[Fold]:
    """All foldable tensors of diffusers' plain transformer blocks, attention and GEGLU feed-forward modules."""
    folds: list[Fold] = []
    for name, module in model.named_modules():
        if type(module).__name__ == "BasicTransformerBlock":
            folds += _norms(name, module)
        folds += _values(name, module)
        net: Any = getattr(module, "net", None)
        if isinstance(net, nn.ModuleList) and len(net) and type(net[0]).__name__ == "GEGLU":
            reader: Any = net[-1]
            if isinstance(net[0].proj, nn.Linear) and isinstance(reader, nn.Linear):
                folds.append(Fold(f"{name}.net.0.proj", (f"{name}.net.{len(net) - 1}",), reader.in_features))
    return folds


def _norms(name: str, block: Any) -> Iterator[Fold]:
    """Outputs of a block's norms: norm1 feeds self-attention, norm2 the queries of cross attention, norm3 the
    feed-forward."""
    cross = getattr(getattr(block, "attn2", None), "is_cross_attention", False)
    reading = {
        "norm1": ("attn1.to_q", "attn1.to_k", "attn1.to_v") if not block.only_cross_attention else (),
        "norm2": ("attn2.to_q",) if cross else (),
        "norm3": ("ff.net.0.proj",),
    }
    if block.norm_type != "layer_norm" or block.pos_embed is not None:
        return
    layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    for norm, readers in reading.items():
        affine = isinstance(getattr(block, norm, None), nn.LayerNorm) and getattr(block, norm).weight is not None
        if affine and readers and all(r in layers for r in readers):
            yield Fold(f"{name}.{norm}", tuple(f"{name}.{r}" for r in readers))


def _values(name: str, module: Any) -> Iterator[Fold]:
    """The values of an attention, unless others join those of ``to_v``: a second stream's (SD3, FLUX) or an
    IP-Adapter's."""
    to_v, to_out, heads = (getattr(module, a, None) for a in ("to_v", "to_out", "heads"))
    if not (isinstance(to_v, nn.Linear) and isinstance(to_out, nn.ModuleList) and isinstance(to_out[0], nn.Linear)):
        return
    others = getattr(module, "add_v_proj", None) is not None or hasattr(getattr(module, "processor", None), "to_v_ip")
    channels = to_v.out_features
    if others or getattr(module, "fused_projections", False) or channels != to_out[0].in_features:
        return
    head = channels // heads if isinstance(heads, int) and heads > 0 and channels % heads == 0 else None
    yield Fold(f"{name}.to_v", (f"{name}.to_out.0",), head=head)


def exponents(smoothing: str) -> list[int]:
    """log2 of the factor that each channel is divided by."""
    return [SMOOTHING.index(c) - SMOOTHING.index("0") for c in smoothing]


def as_smoothing(powers: list[int]) -> str:
    """The inverse of ``exponents``."""
    return "".join(SMOOTHING[SMOOTHING.index("0") + p] for p in powers)


def folded_rows(x: Tensor, folding: Folding) -> Tensor:
    """R (x / s) along the last dimension, for rows ``x`` of the tensor itself."""
    return _changed(x, folding, -1)


def folded_columns(weight: Tensor, folding: Folding) -> Tensor:
    """W diag(s) R^T for the ``weight`` W [N, K] of a layer that reads the tensor."""
    return _changed(weight, folding, 1)


def _changed(x: Tensor, folding: Folding, power: int) -> Tensor:
    """Multiplies channels by s^power, then rotates. Rotation is in float64, so that devices and machines agree; powers
    of two leave the significand of a normal number unchanged."""
    scaled = x if folding.rotation is None else x.double()
    if folding.smoothing is not None:
        powers = torch.tensor(exponents(folding.smoothing), dtype=torch.float64, device=x.device)
        scaled = scaled * (power * powers).exp2().to(scaled.dtype)
    return scaled if folding.rotation is None else rotated(scaled, folding.rotation).to(x.dtype)


def folded_moments(moments: Mapping[str, Tensor], foldings: Mapping[str, Folding]) -> dict[str, Tensor]:
    """Second moments of the folded model's inputs from those of the original model: M -> T M T^T, T = R diag(1 / s).

    Only matrices of layers with a folding are new; layers that shared one matrix and folding share the new one.
    """
    made: dict[tuple[int, Folding], Tensor] = {}
    result = dict(moments)
    for name, folding in foldings.items():
        if folding and name in moments:
            moment, key = moments[name], (id(moments[name]), folding)
            if key not in made:
                made[key] = folded_rows(folded_rows(moment, folding).T, folding).T
            result[name] = made[key]
    return result


def foldings_of(layers: Mapping[str, Any]) -> dict[str, Folding]:
    """{name: folding} of the layers of a Plan or a Calibration that are quantized or have a folding."""
    return {n: Folding.of(v) for n, v in layers.items() if getattr(v, "quantized", True) or Folding.of(v)}


def planned_folds(model: nn.Module, foldings: Mapping[str, Folding]) -> dict[Fold, Folding]:
    """The foldings that ``model`` still lacks for its inputs to be as ``foldings`` says. Changes nothing.

    ``foldings`` names all layers that will be quantized. A layer that is or was quantized, or is in fake mode, records
    the folding of its input, which is not repeated.

    Raises:
        PlanError: a layer's input cannot be folded so, or layers that read it disagree.
        QuantizationError: a layer of a fold is quantized, or folded in another way.
    """
    folds = find_folds(model)
    known = {reader for fold in folds for reader in fold.readers}
    for name, folding in foldings.items():
        if folding and name not in known:
            raise PlanError(
                f"layer {name!r}: {_words(folding)}, but {type(model).__name__} has nothing before it that this folds "
                "into; calibrate this model as it is now (adapters, fused projections and IP-Adapters included)"
            )
    todo: dict[Fold, Folding] = {}
    for fold in folds:
        folding = _agreed(fold, foldings)
        if folding:
            _check_fits(model, fold, folding)
        if folding is not None and not _done(model, fold, folding):
            todo[fold] = folding
    return {fold: folding for fold, folding in todo.items() if folding}


def _agreed(fold: Fold, foldings: Mapping[str, Folding]) -> Folding | None:
    """The folding that all readers ask for; None where ``foldings`` names none of them. Raises PlanError where they
    differ."""
    asked = {reader: foldings[reader] for reader in fold.readers if reader in foldings}
    first = next(iter(asked), "")
    for reader, folding in asked.items():
        if folding != asked[first]:
            raise PlanError(
                f"layers {first!r} and {reader!r} read one tensor, but one has {_words(asked[first])}, the other "
                f"{_words(folding)}; calibrate them together"
            )
    return asked.get(first)


def _check_fits(model: nn.Module, fold: Fold, folding: Folding) -> None:
    reader: Any = model.get_submodule(fold.readers[0])
    size, rotation = reader.in_features, folding.rotation
    if folding.smoothing is not None and len(folding.smoothing) != size:
        raise PlanError(
            f"layer {fold.readers[0]!r}: smoothing is of {len(folding.smoothing)} channels, its input has {size}"
        )
    if rotation is not None and (fold.head is None or fold.head % rotation or hadamard(rotation) is None):
        raise PlanError(
            f"layer {fold.readers[0]!r}: rotation is {rotation}, expected "
            + (
                "null: its input is no attention's values"
                if fold.head is None
                else f"null or {fold.head}, a head's size"
            )
        )


def _done(model: nn.Module, fold: Fold, folding: Folding) -> bool:
    """Whether the readers record that ``folding`` was applied before. Raises QuantizationError where they record
    another one, or where it would change quantized weights."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in (*fold.readers, fold.source)}
    past = [p for name in fold.readers if (p := _past(modules[name])) is not None]
    for layer in past:
        if Folding.of(layer) != folding:
            raise QuantizationError(
                f"layer {fold.readers[0]!r}: its input has {_words(Folding.of(layer))} already, the plan asks for "
                f"{_words(folding)}; load the original model to quantize anew"
            )
    if past or not folding:
        return bool(past)
    for name, module in modules.items():
        if is_quantized(module.weight):
            raise QuantizationError(
                f"layer {name!r} is quantized already, but {_words(folding)} of {fold.readers[0]!r} must change it; "
                "quantize both together, from the original model"
            )
    return False


def _past(module: Any) -> LayerPlan | None:
    """The plan of a layer in fake mode, or the plan it was last quantized by."""
    if isinstance(module, FakeQuantLinear | FakeQuantConv2d):
        return module.quantizer.layer
    return getattr(module, "layer_plan", None)


def _words(folding: Folding) -> str:
    parts = [] if folding.smoothing is None else ["smoothing"]
    parts += [] if folding.rotation is None else [f"rotation {folding.rotation}"]
    return " and ".join(parts) or "neither smoothing nor rotation"


@torch.no_grad()
def fold_(model: nn.Module, folds: Mapping[Fold, Folding]) -> None:
    """Folds into the weights of ``model``, in place."""
    for part, folding, source in _parts(model, folds):
        part.copy_(_folded(part, folding, source))


@contextmanager
def folded(model: nn.Module, folds: Mapping[Fold, Folding]) -> Iterator[None]:
    """Folds into the weights inside the block and restores them, to the bit, on exit.

    Weights that dividing by the same powers of two would not restore exactly are copied: rotated ones, and those that
    underflow in their type.
    """
    changed: list[tuple[Tensor, Tensor | None, Folding, bool]] = []
    try:
        with torch.no_grad():
            for part, folding, source in _parts(model, folds):
                new, inverse = _folded(part, folding, source), folding.smoothed_back()
                exact = folding.rotation is None and torch.equal(_folded(new, inverse, source), part)
                changed.append((part, None if exact else part.clone(), inverse, source))
                part.copy_(new)
        yield
    finally:
        with torch.no_grad():
            for part, kept, inverse, source in reversed(changed):
                part.copy_(_folded(part, inverse, source) if kept is None else kept)


def _parts(model: nn.Module, folds: Mapping[Fold, Folding]) -> Iterator[tuple[Tensor, Folding, bool]]:
    """(tensor to change, its folding, whether it belongs to the source rather than a reader)."""
    for fold, folding in folds.items():
        source: Any = model.get_submodule(fold.source)
        for parameter in (source.weight, source.bias):
            if parameter is not None:
                yield parameter.data[: fold.rows], folding, True
        for reader in fold.readers:
            weight: Any = model.get_submodule(reader).weight
            yield weight.data, folding, False


def _folded(part: Tensor, folding: Folding, source: bool) -> Tensor:
    if not source:
        return folded_columns(part, folding)
    return folded_rows(part.movedim(0, -1), folding).movedim(-1, 0)
