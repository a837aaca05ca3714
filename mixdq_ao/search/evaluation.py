"""One trial of a sensitivity analysis, which quantizes the weight or the input of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from ..layer_plan import LayerPlan
from .calibration import Calibration
from .roundings import PLAIN, rounded_as
from .sensitivity import Kind


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The layer of a trial, weight or activation, the bits, and the rounding of a weight."""

    name: str
    kind: Kind
    bits: int
    rounding: str = PLAIN

    @property
    def label(self) -> str:
        """The bits, and the rounding unless it is PLAIN."""
        return str(self.bits) if self.rounding == PLAIN else f"{self.bits} {self.rounding}"

    @property
    def key(self) -> str:
        return f"{self.name}|{self.kind}|{self.label}"

    def layer(self, calibration: Calibration) -> LayerPlan:
        """The plan of the layer with only its weight, or only its input, quantized."""
        if self.kind == "weight":
            plan = rounded_as(LayerPlan(weight_bits=self.bits), self.rounding)
        else:
            plan = LayerPlan(act_bits=self.bits)
        return calibration.layers[self.name].plan(plan, bos=True, split=True)
