"""Calibration data: the range of every layer's input and the BOS embedding, as a checked JSON file.

Read and written without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from ..document import Document
from ..errors import CalibrationError, PlanError
from ..expect import expect, located
from ..layer_plan import LayerPlan, Range, check_folding, parse_embedding, parse_range

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEYS = ("format", "version", "metadata", "bos_embedding", "ties", "layers")
FOLDING = ("smoothing", "rotation")
"""Fields that are in a file only where the calibration was asked for them."""
LEAST = {"act_size": 1, "macs": 0, "split": 1}
"""Least value of each size; the macs of an unbatched input may have been counted as 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCalibration:
    """Ranges and sizes of one layer's input.

    Attributes:
        act_range: (lo, hi) over every row.
        act_size: input elements of one sample; macs: multiply-adds of one sample.
        split, first_range, second_range: channels of the first part of a concatenated input, and the ranges of both
            parts.
        prompt_range: (lo, hi) over the rows that are not BOS, where the layer reads the text embedding.
        smoothing, rotation: applied to the input before it was observed (see LayerPlan).
    """

    act_range: Range
    act_size: int
    macs: int
    split: int | None = None
    first_range: Range | None = None
    second_range: Range | None = None
    prompt_range: Range | None = None
    smoothing: str | None = None
    rotation: int | None = None

    def plan(self, layer: LayerPlan, *, bos: bool, split: bool) -> LayerPlan:
        """``layer`` with its ranges, split, BOS treatment, smoothing and rotation."""
        if not layer.quantized:
            return layer
        layer = replace(layer, smoothing=self.smoothing, rotation=self.rotation)
        quantized = layer.act_bits < 16
        if split and self.split is not None:
            first, second = (self.first_range, self.second_range) if quantized else (None, None)
            return replace(layer, act_range=first, split=self.split, split_act_range=second)
        aware = bos and self.prompt_range is not None
        act_range = self.prompt_range if bos and self.prompt_range is not None else self.act_range
        return replace(layer, act_range=act_range if quantized else None, bos=aware)


@dataclass(frozen=True, slots=True, repr=False)
class Calibration(Document):
    """Ranges of a model's layers.

    Attributes:
        layers: {name: LayerCalibration}.
        ties: groups of layers that read the same tensor; their ranges are equal.
        bos_embedding: the row the text encoders put first for every prompt, or None where no such row stands out.
        metadata: model class, number of prompts, sampling.
    """

    FORMAT, VERSION, ERROR = "mixdq-calibration", 1, CalibrationError
    layers: Mapping[str, LayerCalibration]
    ties: Sequence[tuple[str, ...]] = ()
    bos_embedding: tuple[float, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def applied(
        self, layers: Mapping[str, LayerPlan], metadata: Mapping[str, Any], *, bos: bool, split: bool
    ) -> dict[str, Any]:
        """The fields of a plan of these layers that ``Plan.with_calibration`` fills in."""
        for name, layer in layers.items():
            if layer.quantized and name not in self.layers:
                raise CalibrationError(
                    f"layer {name!r} was never called while calibrating; "
                    "give it 16 bits or calibrate with prompts that use it"
                )
        planned = {
            n: self.layers[n].plan(v, bos=bos, split=split) if n in self.layers else v for n, v in layers.items()
        }
        sizes = {n: v.act_size for n, v in self.layers.items()}
        metadata = {**metadata, "calibration": dict(self.metadata), "act_sizes": sizes}
        return {"layers": planned, "metadata": metadata, "bos_embedding": self.bos_embedding if bos else None}

    def bos_tensor(self, device: torch.device | None = None) -> Tensor | None:
        """The BOS embedding as a float32 tensor [K], or None."""
        import torch  # plans import this module, and load without torch

        if self.bos_embedding is None:
            return None
        return torch.tensor(self.bos_embedding, dtype=torch.float32, device=device)

    def of_folded_model(self) -> Calibration:
        """The calibration of the model after smoothing and rotation have been folded into its weights."""
        layers = {n: replace(v, smoothing=None, rotation=None) for n, v in self.layers.items()}
        return replace(self, layers=layers)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.header(),
            "bos_embedding": None if self.bos_embedding is None else list(self.bos_embedding),
            "ties": [list(t) for t in self.ties],
            "layers": {n: layer_to_json(v) for n, v in self.layers.items()},
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Calibration:
        if unknown := set(document) - set(KEYS):
            raise CalibrationError(f"unknown key {min(unknown)!r}; expected {', '.join(KEYS)}")
        try:
            layers = {n: _layer(n, v) for n, v in _mapping(document, "layers").items()}
            ties = [_tie(t, layers) for t in document.get("ties", [])]
            return cls(layers, ties, parse_embedding(document.get("bos_embedding")), _mapping(document, "metadata"))
        except (PlanError, TypeError) as e:
            raise CalibrationError(str(e)) from e


def layer_to_json(layer: LayerCalibration) -> dict[str, Any]:
    """All fields, but those of FOLDING only where they are not None."""
    return {n: v for n, v in asdict(layer).items() if v is not None or n not in FOLDING}


def _mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(document.get(key), dict):
        raise CalibrationError(f"{key} is {type(document.get(key)).__name__}, expected an object")
    return document[key]


def _tie(tie: object, layers: Mapping[str, object]) -> tuple[str, ...]:
    if not isinstance(tie, list) or not all(isinstance(n, str) and n in layers for n in tie):
        raise CalibrationError(f"ties holds {tie!r}, expected lists of layer names of this file")
    return tuple(tie)


def _layer(name: str, value: object) -> LayerCalibration:
    known = {f.name for f in fields(LayerCalibration)}
    needed = known - set(FOLDING)
    with located(f"layer {name!r}", CalibrationError):
        if not isinstance(value, dict) or not needed <= set(value) <= known:
            raise CalibrationError(
                f"expected an object with {', '.join(sorted(needed))}, maybe {' and '.join(FOLDING)}, and no more"
            )
        try:
            check_folding(value.get("smoothing"), value.get("rotation"))
            ranges = {n: None if v is None else parse_range(n, v) for n, v in value.items() if n.endswith("_range")}
        except PlanError as e:
            raise CalibrationError(str(e)) from e
        if ranges["act_range"] is None:
            raise CalibrationError("act_range is null, expected [lo, hi]")
        sizes = {n: value[n] for n in LEAST}
        for n, v in sizes.items():
            valid = type(v) is int and LEAST[n] <= v < 2**53
            expected = f"a whole number from {LEAST[n]} below 2^53"
            expect(valid or (n == "split" and v is None), n, v, expected, CalibrationError)
        if (sizes["split"] is None) != (ranges["first_range"] is None or ranges["second_range"] is None):
            raise CalibrationError("split, first_range and second_range come together")
    folding = {n: value.get(n) for n in FOLDING}
    return LayerCalibration(**sizes, **ranges, **folding)  # type: ignore[arg-type]
