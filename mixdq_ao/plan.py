"""Plan: which bits, ranges and treatment each layer gets. One readable JSON file; nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from .document import Document
from .errors import PlanError

if TYPE_CHECKING:
    from torch import nn

    from .search.calibration import Calibration

WEIGHT_BITS = (2, 4, 8, 16)
ACT_BITS = (4, 8, 16)
Range = tuple[float, float]
WeightRange = Literal["minmax", "mse", "output"]
Rounding = Literal["nearest", "compensated"]
SMOOTHING = "ihgfedcba0123456789"
"""A channel's power of two: "0" leaves it, "1" to "9" make it smaller by 2 to 2^9, "a" to "i" larger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """What one linear or convolution layer becomes.

    Attributes:
        weight_bits: 2, 4, 8 or 16 (16: kept as it is).
        act_bits: 4, 8 or 16 (16: kept as it is). 4 uses 16 levels of an 8-bit container: it costs quality and
            saves no time on current hardware.
        symmetric: weights without a zero point. Default: true at 8 and 16 bits, false at 4 and 2 (symmetric
            2 bit is ternary). 8 bit is always symmetric.
        act_range: (lo, hi) of the input, from calibration; (lo, hi) of the first half where ``split`` is set.
        split: channels of the first half of a concatenated input, quantized with its own range and scales.
        split_act_range: (lo, hi) of the second half where ``split`` is set.
        bos: rows equal to the plan's BOS embedding give the precomputed full-precision output row.
        weight_range: what each output channel's scale is made for: "minmax", all its weights; "mse", the least squared
            error of the weights; "output", the least squared error of the layer's output. Same bytes, same speed.
        rounding: "nearest", or "compensated": weights not yet rounded make up for the error of those that are. This
            and "output" need the second moments of the layer's input when quantizing (``input_moments``).
        smoothing: a character of SMOOTHING for each channel of the input: what makes the input gives that much less,
            and the weight that reads it is made larger. Full precision computes the same. From
            ``calibrate(smoothing=)``.
        rotation: channels of the input are rotated in blocks of so many by a Hadamard matrix, within the heads of
            attention: what makes the values is rotated, and so is the weight that reads them. From
            ``calibrate(rotation=True)``. Ranges are those of the input after both.
    """

    weight_bits: int = 16
    act_bits: int = 16
    symmetric: bool | None = None
    act_range: Range | None = None
    split: int | None = None
    split_act_range: Range | None = None
    bos: bool = False
    weight_range: WeightRange = "minmax"
    rounding: Rounding = "nearest"
    smoothing: str | None = None
    rotation: int | None = None

    def __post_init__(self) -> None:
        _expect(
            type(self.weight_bits) is int and self.weight_bits in WEIGHT_BITS,
            "weight_bits",
            self.weight_bits,
            "one of 2, 4, 8, 16",
        )
        _expect(
            type(self.act_bits) is int and self.act_bits in ACT_BITS,
            "act_bits",
            self.act_bits,
            "one of 4, 8, 16",
        )
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", self.weight_bits >= 8)
        _expect(isinstance(self.symmetric, bool), "symmetric", self.symmetric, "true or false")
        _expect(self.symmetric or self.weight_bits < 8, "symmetric", self.symmetric, "true at 8 and 16 bits")
        for name in ("act_range", "split_act_range"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, parse_range(name, value))
        _expect(
            self.split is None or (type(self.split) is int and self.split > 0),
            "split",
            self.split,
            "a positive number of channels, or null",
        )
        _expect(
            self.split is not None or self.split_act_range is None,
            "split_act_range",
            self.split_act_range,
            "null where split is null",
        )
        _expect(isinstance(self.bos, bool), "bos", self.bos, "true or false")
        _expect_one_of("weight_range", self.weight_range, get_args(WeightRange))
        _expect_one_of("rounding", self.rounding, get_args(Rounding))
        plain = self.weight_range == "minmax" and self.rounding == "nearest"
        _expect(
            plain or self.weight_bits < 16,
            "rounding" if self.weight_range == "minmax" else "weight_range",
            self.rounding if self.weight_range == "minmax" else self.weight_range,
            "'nearest' and 'minmax' at 16 bits",
        )
        check_folding(self.smoothing, self.rotation)

    @property
    def quantized(self) -> bool:
        return self.weight_bits < 16 or self.act_bits < 16

    @property
    def calibrated(self) -> bool:
        """Every range a static activation quantizer needs is there."""
        return self.act_bits == 16 or (
            self.act_range is not None and (self.split is None or self.split_act_range is not None)
        )

    @property
    def needs_moment(self) -> bool:
        """The weight cannot be rounded without the second moment of the layer's input."""
        return self.weight_range == "output" or self.rounding == "compensated"

    @property
    def folds_input(self) -> bool:
        """Planned for another input than the original model gives the layer: ``quantize_`` changes what makes it."""
        return self.smoothing is not None or self.rotation is not None

    def to_json(self) -> dict[str, Any]:
        """All fields, ranges as lists; fields at their default are left out to keep the file readable."""
        defaults = LayerPlan(weight_bits=self.weight_bits, act_bits=self.act_bits)
        values = {n: v for n, v in asdict(self).items() if n.endswith("_bits") or v != getattr(defaults, n)}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}


def _expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise PlanError(f"{name} is {value!r}, expected {expected}")


def _expect_one_of(name: str, value: object, offered: tuple[str, ...]) -> None:
    _expect(isinstance(value, str) and value in offered, name, value, f"one of {', '.join(map(repr, offered))}")


def check_folding(smoothing: object, rotation: object) -> None:
    """Raises PlanError unless both are what a LayerPlan can hold."""
    _expect(
        smoothing is None or (isinstance(smoothing, str) and smoothing != "" and not set(smoothing) - set(SMOOTHING)),
        "smoothing",
        smoothing,
        "a character a channel, 0 to 9 or a to i, or null",
    )
    _expect(
        rotation is None or (type(rotation) is int and rotation > 1),
        "rotation",
        rotation,
        "the order of a Hadamard matrix, or null",
    )


LARGEST = 1e38
"""What ranges and embeddings may hold: a span of two of them is a number of float32."""


def parse_range(name: str, value: object) -> Range:
    ok = isinstance(value, tuple | list) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    _expect(ok, name, value, "[lo, hi], two numbers, or null")
    in_range = all(abs(v) <= LARGEST for v in value)  # type: ignore[union-attr]  # False for NaN
    _expect(in_range, name, value, f"numbers from -{LARGEST:g} to {LARGEST:g}")
    lo, hi = (float(v) for v in value)  # type: ignore[union-attr]
    _expect(lo <= hi, name, value, "lo <= hi")
    return lo, hi


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """Figures of a plan on a model.

    Attributes:
        average_weight_bits: mean over weights (elements) of all linear and convolution layers, scales excluded.
        average_act_bits: mean over input elements where the plan's metadata holds them (``act_sizes``, written
            by ``with_calibration``), else over layers.
        bytes: bytes of the weights, scales, zero points, BOS rows and biases that the quantized layers hold,
            and of the layers kept as they are, in the model's own type.
        counts: layers per weight bits; ``act_counts`` per activation bits.
    """

    average_weight_bits: float
    average_act_bits: float
    bytes: int
    counts: dict[int, int]
    act_counts: dict[int, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{n} layers at W{b}" for b, n in sorted(self.counts.items()))
        return (
            f"{self.average_weight_bits:.2f} weight bits, {self.average_act_bits:.2f} activation bits on average, "
            f"{self.bytes / 2**20:.2f} MiB ({counts})"
        )


@dataclass(frozen=True, slots=True, repr=False)
class Plan(Document):
    """Bits and ranges of every layer of one model, keyed by the layer's name as ``named_modules`` gives it."""

    FORMAT, VERSION, ERROR = "mixdq-plan", 1, PlanError
    layers: Mapping[str, LayerPlan]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    bos_embedding: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "metadata"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise PlanError(f"{name} is {value!r:.60}, expected a mapping")
        object.__setattr__(self, "bos_embedding", parse_embedding(self.bos_embedding))
        for name, layer in self.layers.items():
            if not isinstance(name, str) or not isinstance(layer, LayerPlan):
                raise PlanError(f"layer {name!r}: expected a name and a LayerPlan, got {type(layer).__name__}")
            if layer.bos and self.bos_embedding is None:
                raise PlanError(
                    f"layer {name!r}: bos is true but the plan has no bos_embedding; calibrate with BOS handling"
                )

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Plan:
        unknown = set(document) - {"format", "version", "metadata", "bos_embedding", "layers"}
        if unknown:
            raise PlanError(f"unknown key {min(unknown)!r}; expected format, version, metadata, bos_embedding, layers")
        metadata, layers = document.get("metadata", {}), document.get("layers")
        if not isinstance(metadata, dict):
            raise PlanError(f"metadata is {type(metadata).__name__}, expected an object")
        if not isinstance(layers, dict):
            raise PlanError(f"layers is {type(layers).__name__}, expected an object of layer names")
        return cls(
            {n: _layer_from_json(n, v) for n, v in layers.items()},
            metadata,
            parse_embedding(document.get("bos_embedding")),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **self.header(),
            "bos_embedding": None if self.bos_embedding is None else list(self.bos_embedding),
            "layers": {n: v.to_json() for n, v in self.layers.items()},
        }

    @classmethod
    def uniform(cls, model: nn.Module, weight_bits: int, act_bits: int) -> Plan:
        """The same bits for every linear and convolution layer of ``model``."""
        from .layers import find_layers

        layer = LayerPlan(weight_bits=weight_bits, act_bits=act_bits)
        return cls({name: layer for name in find_layers(model)}, {"source": f"uniform W{weight_bits}A{act_bits}"})

    @classmethod
    def from_mixdq_yaml(
        cls,
        weight: str | os.PathLike[str],
        act: str | os.PathLike[str] | None = None,
        protect: Iterable[str] = (),
    ) -> Plan:
        """The MixDQ authors' plan files: one ``model.<name>: bits`` a line (see ``importing``)."""
        from .importing import plan_from_mixdq_yaml

        return plan_from_mixdq_yaml(weight, act, protect)

    def with_layers(self, layers: Mapping[str, LayerPlan]) -> Plan:
        """A copy in which the given layers are replaced or added."""
        return replace(self, layers={**self.layers, **layers})

    def with_calibration(self, calibration: Calibration, *, bos: bool = True, split: bool = True) -> Plan:
        """A copy with ranges, split points and BOS treatment filled in from a calibration.

        ``bos=False`` takes the ranges with the BOS rows inside, as a quantizer that knows nothing of them
        would; ``split=False`` one range for a concatenated input.
        """
        from .search.calibration import Calibration

        return Calibration.expect(calibration, "calibration").apply(self, bos=bos, split=split)

    def validate(self, model: nn.Module) -> None:
        """Raises PlanError, before anything is changed, unless every planned layer exists in ``model``, is a
        linear or convolution layer that can be quantized as asked, and has the ranges it needs."""
        from .layers import check_plan

        check_plan(self, model)

    def summary(self, model: nn.Module) -> PlanSummary:
        """Average bits and bytes of this plan on ``model`` (works on the meta device)."""
        from .layers import summarize

        return summarize(self, model)


def _layer_from_json(name: str, value: object) -> LayerPlan:
    if not isinstance(value, dict):
        raise PlanError(f"layer {name!r}: is {type(value).__name__}, expected an object")
    known = {f.name for f in fields(LayerPlan)}
    unknown = set(value) - known
    if unknown:
        raise PlanError(f"layer {name!r}: unknown field {min(unknown)!r}; expected {', '.join(sorted(known))}")
    try:
        return LayerPlan(**value)
    except PlanError as e:
        raise PlanError(f"layer {name!r}: {e}") from e


def parse_embedding(value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(type(v) in (int, float) and abs(v) <= LARGEST for v in value)
    ):
        raise PlanError(f"bos_embedding is not a non-empty list of numbers from -{LARGEST:g} to {LARGEST:g} (or null)")
    return tuple(float(v) for v in value)
