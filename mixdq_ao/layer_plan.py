"""The plan of one layer: bits, ranges and treatment, with every field checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .errors import PlanError
from .expect import expect, located

WEIGHT_BITS = (2, 4, 8, 16)
ACT_BITS = (4, 8, 16)
Range = tuple[float, float]
WeightRange = Literal["minmax", "mse", "output"]
Rounding = Literal["nearest", "compensated"]
SMOOTHING = "ihgfedcba0123456789"
"""One character per power of two: "0" is 1, "1" to "9" divide a channel by 2 to 2^9, "a" to "i" multiply it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """How one linear or convolution layer is quantized.

    Attributes:
        weight_bits: 2, 4, 8, or 16 (not quantized).
        act_bits: 4, 8, or 16 (not quantized). 4 uses 16 levels of an 8-bit container: it costs quality and
            saves no time on current hardware.
        symmetric: weights without a zero point. Default: true at 8 and 16 bits, false at 4 and 2 (symmetric
            2 bit is ternary). 8 bit is always symmetric.
        act_range: (lo, hi) of the input, from calibration; (lo, hi) of the first half where ``split`` is set.
        split: channels of the first half of a concatenated input, quantized with its own range and scales.
        split_act_range: (lo, hi) of the second half where ``split`` is set.
        bos: input rows equal to the plan's BOS embedding give a precomputed full-precision output row.
        weight_range: the criterion for each output channel's scale: "minmax" covers all its weights, "mse" minimizes
            the squared error of the weights, "output" the squared error of the layer's output. Size and speed are the
            same.
        rounding: "nearest", or "compensated": each column's rounding error is compensated by the columns that are not
            rounded yet. This and "output" need the second moments of the layer's input (``input_moments``).
        smoothing: one character of SMOOTHING per input channel, a power of two that the input is divided by and the
            weight multiplied by; full precision computes the same. From ``calibrate(smoothing=)``.
        rotation: block size of a Hadamard rotation of the input channels within attention heads, which is applied to
            the value projection and undone in this layer's weight. From ``calibrate(rotation=True)``. ``act_range`` is
            that of the input after smoothing and rotation.
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
        """Whether all activation ranges that the layer needs are known."""
        return self.act_bits == 16 or (
            self.act_range is not None and (self.split is None or self.split_act_range is not None)
        )

    @property
    def needs_moment(self) -> bool:
        """Whether rounding the weight needs the second moment of the layer's input."""
        return self.weight_range == "output" or self.rounding == "compensated"

    @property
    def folds_input(self) -> bool:
        """Whether the layer's input is smoothed or rotated; ``quantize_`` then also changes the input's producer."""
        return self.smoothing is not None or self.rotation is not None

    def to_json(self) -> dict[str, Any]:
        """The bits and every field that is not at its default; ranges as lists."""
        defaults = LayerPlan(weight_bits=self.weight_bits, act_bits=self.act_bits)
        values = {n: v for n, v in asdict(self).items() if n.endswith("_bits") or v != getattr(defaults, n)}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}


def _expect(good: bool, name: str, value: object, expected: str) -> None:
    expect(good, name, value, expected, PlanError)


def _expect_one_of(name: str, value: object, offered: tuple[str, ...]) -> None:
    _expect(isinstance(value, str) and value in offered, name, value, f"one of {', '.join(map(repr, offered))}")


def check_folding(smoothing: object, rotation: object) -> None:
    """Raises PlanError unless both are valid fields of a LayerPlan."""
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
"""The largest magnitude in ranges and embeddings: the difference of two such numbers fits float32."""


def parse_range(name: str, value: object) -> Range:
    ok = isinstance(value, tuple | list) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    _expect(ok, name, value, "[lo, hi], two numbers, or null")
    in_range = all(abs(v) <= LARGEST for v in value)  # type: ignore[union-attr]  # False for NaN
    _expect(in_range, name, value, f"numbers from -{LARGEST:g} to {LARGEST:g}")
    lo, hi = (float(v) for v in value)  # type: ignore[union-attr]
    _expect(lo <= hi, name, value, "lo <= hi")
    return lo, hi


def layer_from_json(name: str, value: object) -> LayerPlan:
    if not isinstance(value, dict):
        raise PlanError(f"layer {name!r}: is {type(value).__name__}, expected an object")
    known = {f.name for f in fields(LayerPlan)}
    unknown = set(value) - known
    if unknown:
        raise PlanError(f"layer {name!r}: unknown field {min(unknown)!r}; expected {', '.join(sorted(known))}")
    with located(f"layer {name!r}", PlanError):
        return LayerPlan(**value)


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
