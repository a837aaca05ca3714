"""Sensitivity: how much each layer harms the picture at each bit width, and the JSON file that holds it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..document import Document
from ..errors import SensitivityError
from ..expect import expect, is_number, located
from .roundings import PLAIN, ROUNDINGS

BITS = (2, 4, 8, 16)
GROUPS = ("content", "quality")
ERROR_FLOOR = 1e-12
"""Relative error power (-120 dB) below which a difference is float32 rounding."""

Kind = Literal["weight", "act"]


def sqnr_from_error(error: float, floor: float = ERROR_FLOOR) -> float:
    """Signal to quantization noise ratio in dB of a relative error power; at most ``-10 log10(floor)``."""
    return -10.0 * math.log10(max(error, floor))


def error_from_sqnr(decibel: float) -> float:
    """Relative error power ``sum (y - yq)^2 / sum y^2`` of a signal to quantization noise ratio in dB."""
    return 10.0 ** (-decibel / 10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSensitivity:
    """Scores and errors with only this layer quantized, its weight or its activation, at each bit width.

    Attributes:
        group: "content" (judged by SSIM of the decoded picture) or "quality" (by SQNR of the model's output).
        weight_size: number of weights.
        act_size: input elements per sample.
        weight_scores, act_scores: {bits: the group's metric, SSIM or dB}; higher is less sensitive.
        weight_errors, act_errors: {bits: relative error power of the model's output}; may be empty.
        weight_bytes: {bits: bytes stored, scales and zero points included}; may be empty.
        weight_roundings: {bits: the rounding, one of ``roundings.ROUNDINGS``, that scores and errors were measured with
            and that ``allocate`` plans}; "minmax nearest" for bits that are absent.
    """

    group: Literal["content", "quality"]
    weight_size: int
    act_size: int
    weight_scores: Mapping[int, float] = field(default_factory=dict)
    act_scores: Mapping[int, float] = field(default_factory=dict)
    weight_errors: Mapping[int, float] = field(default_factory=dict)
    act_errors: Mapping[int, float] = field(default_factory=dict)
    weight_bytes: Mapping[int, int] = field(default_factory=dict)
    weight_roundings: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expect(self.group in GROUPS, "group", self.group, "'content' or 'quality'", SensitivityError)
        for name in ("weight_size", "act_size"):
            value = getattr(self, name)
            expect(_is_count(value), name, value, "a positive integer", SensitivityError)
        for name in ("weight_scores", "act_scores"):
            _check_table(name, getattr(self, name), is_number, "a finite number")
        for name in ("weight_errors", "act_errors"):
            _check_table(name, getattr(self, name), _is_error, "a finite number >= 0")
        _check_table("weight_bytes", self.weight_bytes, _is_count, "a positive integer")
        roundings = f"one of {', '.join(map(repr, ROUNDINGS))}"
        _check_table("weight_roundings", self.weight_roundings, _is_rounding, roundings)

    def scores(self, kind: Kind) -> Mapping[int, float]:
        return self.weight_scores if kind == "weight" else self.act_scores

    def errors(self, kind: Kind) -> Mapping[int, float]:
        return self.weight_errors if kind == "weight" else self.act_errors

    def size(self, kind: Kind) -> int:
        return self.weight_size if kind == "weight" else self.act_size

    def sqnr(self, kind: Kind) -> dict[int, float]:
        """{bits: SQNR in dB of the model's output}, from the error powers; without these, a quality layer's scores."""
        if errors := self.errors(kind):
            return {bits: sqnr_from_error(error) for bits, error in errors.items()}
        return dict(self.scores(kind)) if self.group == "quality" else {}

    def rounding(self, bits: int) -> str:
        """The rounding that the weight's scores and errors at ``bits`` were measured with."""
        return self.weight_roundings.get(bits, PLAIN)

    def to_json(self) -> dict[str, Any]:
        """All fields, but ``weight_roundings`` where not empty: other files are as before it existed."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if not self.weight_roundings:
            del values["weight_roundings"]
        return {n: {str(b): x for b, x in v.items()} if isinstance(v, Mapping) else v for n, v in values.items()}


@dataclass(frozen=True, slots=True, repr=False)
class Sensitivity(Document):
    """The sensitivity of every layer of one model, by name, and how it was measured.

    ``metadata["noise_floor"]``, if present, is the relative error power of the measurement itself (by which two runs
    of the unquantized model differ); allocation treats smaller differences as none.
    """

    FORMAT, VERSION, ERROR = "mixdq-sensitivity", 1, SensitivityError
    layers: Mapping[str, LayerSensitivity]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise SensitivityError("layers is empty, expected at least one layer")
        for name, layer in self.layers.items():
            if not isinstance(name, str) or not name or not isinstance(layer, LayerSensitivity):
                raise SensitivityError(
                    f"layer {name!r}: is {type(layer).__name__}, expected a name and a LayerSensitivity"
                )
        floor = self.metadata.get("noise_floor", 0.0)
        expect(_is_error(floor), "metadata: noise_floor", floor, "a finite number >= 0", SensitivityError)

    @property
    def noise_floor(self) -> float:
        return max(float(self.metadata.get("noise_floor", 0.0)), ERROR_FLOOR)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Sensitivity:
        unknown = set(document) - {"format", "version", "metadata", "layers"}
        if unknown:
            raise SensitivityError(f"unknown key {min(unknown)!r}; expected format, version, metadata, layers")
        metadata, layers = document.get("metadata", {}), document.get("layers")
        for name, value in (("metadata", metadata), ("layers", layers)):
            if not isinstance(value, dict):
                raise SensitivityError(f"{name} is {type(value).__name__}, expected an object")
        return cls({n: _layer_from_json(n, v) for n, v in layers.items()}, metadata)  # type: ignore[union-attr]

    def to_json(self) -> dict[str, Any]:
        return {**self.header(), "layers": {n: v.to_json() for n, v in self.layers.items()}}

    @classmethod
    def from_mixdq_yaml(
        cls,
        *,
        weight_ssim: str | os.PathLike[str],
        weight_sqnr: str | os.PathLike[str],
        act_ssim: str | os.PathLike[str],
        act_sqnr: str | os.PathLike[str],
        weight_ratio: str | os.PathLike[str],
        act_ratio: str | os.PathLike[str],
    ) -> Sensitivity:
        """The MixDQ authors' sensitivity and size files (see ``mixdq_yaml``)."""
        from .mixdq_yaml import sensitivity_from_mixdq_yaml  # imports this module

        return sensitivity_from_mixdq_yaml(weight_ssim, weight_sqnr, act_ssim, act_sqnr, weight_ratio, act_ratio)


def _is_error(value: object) -> bool:
    return is_number(value) and value >= 0


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**53


def _is_rounding(value: object) -> bool:
    return isinstance(value, str) and value in ROUNDINGS


def _check_table(name: str, table: object, valid: Callable[[object], bool], expected: str) -> None:
    if not isinstance(table, Mapping):
        raise SensitivityError(f"{name} is {type(table).__name__}, expected {{bits: value}}")
    for bits, value in table.items():
        if type(bits) is not int or bits not in BITS:
            raise SensitivityError(f"{name}: bits {bits!r}, expected one of 2, 4, 8, 16")
        expect(valid(value), f"{name} at {bits} bits", value, expected, SensitivityError)


def _layer_from_json(name: str, value: object) -> LayerSensitivity:
    if not isinstance(value, dict):
        raise SensitivityError(f"layer {name!r}: is {type(value).__name__}, expected an object")
    known = {f.name for f in fields(LayerSensitivity)}
    for problem, names in (
        ("unknown", set(value) - known),
        ("missing", {"group", "weight_size", "act_size"} - set(value)),
    ):
        if names:
            raise SensitivityError(
                f"layer {name!r}: {problem} field {min(names)!r}; expected {', '.join(sorted(known))}"
            )
    values: dict[str, Any] = {n: _integer_keys(v) if isinstance(v, dict) else v for n, v in value.items()}
    with located(f"layer {name!r}", SensitivityError):
        return LayerSensitivity(**values)


def _integer_keys(table: dict[str, Any]) -> dict[Any, Any]:
    """Keys of JSON such as "4" as integers; any other key stays as it is and is refused by name later."""
    return {int(key) if key in ("2", "4", "8", "16") else key: value for key, value in table.items()}
