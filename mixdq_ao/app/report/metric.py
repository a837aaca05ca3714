"""The metric that scores a group of layers: how its values are formatted and placed on a scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...search.sensitivity import Sensitivity

TOP = 80.0  # dB; beyond it differences mean nothing


@dataclass(frozen=True, slots=True)
class Metric:
    """``unit`` is "dB", or empty for a similarity that ends at 1."""

    name: str
    unit: str = ""

    @property
    def digits(self) -> int:
        return 1 if self.unit else 4

    def amount(self, value: float) -> str:
        """A difference: "0.0123 SSIM", "4.5 dB"."""
        return f"{value:.{self.digits}f}\u00a0{self.unit or self.name}"

    def score(self, value: float) -> str:
        """A score with its metric: "SSIM 0.9876", "45.6 dB"."""
        return f"{value:.{self.digits}f} {self.unit}" if self.unit else f"{self.name} {value:.{self.digits}f}"

    def position(self, value: float) -> float:
        """The score in dB, for a scale that spreads the good end: similarities as -10 log10(1 - s)."""
        return min(value if self.unit else -10 * math.log10(max(1 - value, 1e-8)), TOP)


SSIM, PSNR, SQNR = Metric("SSIM"), Metric("PSNR", "dB"), Metric("SQNR", "dB")


def metrics(sensitivity: Sensitivity) -> Mapping[str, Metric]:
    """{group: metric}. Content is scored by PSNR in an analysis by probes, by SSIM in one layer by layer."""
    content = PSNR if sensitivity.metadata.get("content_score") == "psnr" else SSIM
    return {"content": content, "quality": SQNR}
