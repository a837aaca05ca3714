"""Changes of a tensor between two layers that fold into the weights around it: same function, other numbers to round.

    x -> R (x / s),   W -> W diag(s) R^T        s: powers of two (``smoothing``); R: Hadamard blocks (``rotation``)

Three places of a transformer block let channels be scaled: a LayerNorm and the layers that read it, values and the
output projection of attention (attention mixes rows, never channels), and the linear half of a GEGLU and the layer
after it. Between values and output projection channels can be rotated too, within a head. Scaling: SmoothQuant (arXiv
2211.10438); rotating: QuaRot (arXiv 2404.00456).

A LayerPlan says it of the layer that reads the tensor; what makes the tensor is found in the model.
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
    """A tensor that only ``readers`` read, and ``source``, whose weight (rows, or elements of a norm) and bias make it.

    ``rows``: only so many first rows of the source do; None: all. ``head``: channels of one head where the tensor goes
    through attention as values; None: its channels cannot be mixed.
    """

    source: str
    readers: tuple[str, ...]
    rows: int | None = None
    head: int | None = None


@dataclass(frozen=True, slots=True)
class Folding:
    """What is done to a tensor: the fields of a LayerPlan. False where it is nothing."""

    smoothing: str | None = None
    rotation: int | None = None

    @classmethod
    def of(cls, layer: Any) -> Folding:
        """That of whatever has the two fields."""
        return cls(layer.smoothing, layer.rotation)

    def __bool__(self) -> bool:
        return self.smoothing is not None or self.rotation is not None

    def smoothed_back(self) -> Folding:
        """What takes the smoothing back."""
        return Folding(None if self.smoothing is None else as_smoothing([-p for p in exponents(self.smoothing)]))


def find_folds(model: nn.Module) -> list[Fold]:
    """Every place in diffusers' plain transformer blocks, attention and GEGLU feed-forward modules."""
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
    """norm1 feeds self-attention, norm2 the queries of cross attention, norm3 the feed-forward."""
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
    """Not where other values join those of ``to_v``: a second stream's (SD3, FLUX) or an IP-Adapter's."""
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
    """The powers of two that channels are made smaller by."""
    return [SMOOTHING.index(c) - SMOOTHING.index("0") for c in smoothing]


def as_smoothing(powers: list[int]) -> str:
    """What ``exponents`` reads."""
    return "".join(SMOOTHING[SMOOTHING.index("0") + p] for p in powers)


def folded_rows(x: Tensor, folding: Folding) -> Tensor:
    """R (x / s) for the last dimension of ``x``: rows of the tensor itself."""
    return _changed(x, folding, -1)


def folded_columns(weight: Tensor, folding: Folding) -> Tensor:
    """W diag(s) R^T for ``weight`` [N, K]: that of a layer that reads the tensor."""
    return _changed(weight, folding, 1)


def _changed(x: Tensor, folding: Folding, power: int) -> Tensor:
    """Rotated in float64, so that devices and machines agree; powers of two change no bit of a normal number."""
    scaled = x if folding.rotation is None else x.double()
    if folding.smoothing is not None:
        powers = torch.tensor(exponents(folding.smoothing), dtype=torch.float64, device=x.device)
        scaled = scaled * (power * powers).exp2().to(scaled.dtype)
    return scaled if folding.rotation is None else rotated(scaled, folding.rotation).to(x.dtype)


def folded_moments(moments: Mapping[str, Tensor], foldings: Mapping[str, Folding]) -> dict[str, Tensor]:
    """Second moments of the original model's inputs as those of the folded model: M -> T M T^T with T = R diag(1 / s).

    Only matrices of layers with a folding are made anew; those shared before are shared again.
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
    """Of layers of a Plan or a Calibration, those that are quantized and those with a folding."""
    return {n: Folding.of(v) for n, v in layers.items() if getattr(v, "quantized", True) or Folding.of(v)}


def planned_folds(model: nn.Module, foldings: Mapping[str, Folding]) -> dict[Fold, Folding]:
    """What is still to be done to ``model`` so that the inputs of its layers are as ``foldings`` says, which names all
    layers that will be quantized. Nothing is changed.

    A layer in fake mode, or quantized before, says what was done to its input; that is not done twice.

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
    """What all readers ask for; None where there is none of them."""
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
    """Whether ``folding`` has been done, as the readers know it."""
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
    """The plan that a layer carries out in fake mode, or was last quantized by."""
    if isinstance(module, FakeQuantLinear | FakeQuantConv2d):
        return module.quantizer.layer
    return getattr(module, "layer_plan", None)


def _words(folding: Folding) -> str:
    parts = [] if folding.smoothing is None else ["smoothing"]
    parts += [] if folding.rotation is None else [f"rotation {folding.rotation}"]
    return " and ".join(parts) or "neither smoothing nor rotation"


@torch.no_grad()
def fold_(model: nn.Module, folds: Mapping[Fold, Folding]) -> None:
    """Changes the weights, in place and for good."""
    for part, folding, source in _parts(model, folds):
        part.copy_(_folded(part, folding, source))


@contextmanager
def folded(model: nn.Module, folds: Mapping[Fold, Folding]) -> Iterator[None]:
    """The same inside the block; afterwards weights are what they were, to the bit.

    Copies are kept of those that arithmetic does not bring back exactly: rotated ones, and those whose type underflows.
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
    """(what changes, how, whether it makes the tensor or reads it)."""
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
