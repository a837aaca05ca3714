"""Plan: which bits, ranges and treatment each layer gets. One readable JSON file; nothing is unpickled.

Plans are read and written without importing torch; methods that take a model import what they need.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .document import Document
from .errors import PlanError
from .importing import read_mixdq_plan
from .layer_plan import LayerPlan, layer_from_json, parse_embedding
from .search.calibration import Calibration

if TYPE_CHECKING:
    from torch import nn


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
    """Bits and ranges of the layers of one model, keyed by their names in ``named_modules()``."""

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
            {n: layer_from_json(n, v) for n, v in layers.items()},
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
        return cls(*read_mixdq_plan(weight, act, protect))

    def with_layers(self, layers: Mapping[str, LayerPlan]) -> Plan:
        """A copy in which the given layers are replaced or added."""
        return replace(self, layers={**self.layers, **layers})

    def with_calibration(self, calibration: Calibration, *, bos: bool = True, split: bool = True) -> Plan:
        """A copy with ranges, split points and BOS treatment filled in from a calibration.

        ``bos=False`` takes ranges that include the BOS rows, as an ordinary quantizer would; ``split=False`` takes one
        range for a concatenated input.
        """
        calibration = Calibration.expect(calibration, "calibration")
        return replace(self, **calibration.applied(self.layers, self.metadata, bos=bos, split=split))

    def validate(self, model: nn.Module) -> None:
        """Raises PlanError, before anything is changed, unless every planned layer exists in ``model``, is a
        linear or convolution layer that can be quantized as asked, and has the ranges it needs."""
        from .plan_check import check_plan

        check_plan(self, model)

    def summary(self, model: nn.Module) -> PlanSummary:
        """Average bits and bytes of this plan on ``model``, which may be on the meta device."""
        from .plan_size import summarize

        return summarize(self, model)
