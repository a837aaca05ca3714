"""MixDQ's procedure as its paper describes it, from our parts (Zhao et al., arXiv 2405.17873, section 4).

Sensitivities one layer at a time, each judged by its group's metric; integer programs over {2, 4, 8} bits for content
and {4, 8} for quality layers, the budget divided between the groups by the published grid of ratios; BOS apart,
ranges by minimum and maximum, rounding to nearest; 8-bit activations but for the 1 % of layers that suffer most from
them. Of the candidates the one whose pictures of other captions are the closest to full precision.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from torch import nn

from mixdq_ao import Plan, analyze, mixdq_config, quantize_
from mixdq_ao.search.allocate import sweep
from mixdq_ao.search.calibration import Calibration

from .judge import Judge
from .kept import kept_seconds
from .subject import Subject

ANALYZED = 8


class Published:
    """``seconds``: of one core for the sensitivities, with what comes before a changed layer computed once."""

    def __init__(self, subject: Subject, calibration: Calibration, work: Path) -> None:
        self.calibration = calibration
        start = time.process_time()
        self.sensitivity = analyze(
            subject.pipe, subject.calibrating[:ANALYZED], store=work / "one_at_a_time.jsonl", calibration=calibration,
            batch_size=ANALYZED,
        )  # fmt: skip
        self.seconds = kept_seconds(work / "one_at_a_time.json", time.process_time() - start)
        errors = {n: layer.act_errors[8] for n, layer in self.sensitivity.layers.items()}
        self.protected = sorted(errors, key=errors.__getitem__, reverse=True)[: math.ceil(0.01 * len(errors))]
        self.judge = Judge(subject, self.quantize)

    def plan(self, weight_bits: float) -> Plan:
        """Raises AllocationError where no plan has so few bits."""
        found = sweep(self.sensitivity, weight_bits=weight_bits, objective="decoupled", protect=self.protected)
        plans = {a.weight_bytes: a.plan.with_calibration(self.calibration) for a in found}
        return self.judge.best(plans.values())

    def quantize(self, unet: nn.Module, plan: Plan) -> nn.Module:
        quantize_(unet, mixdq_config(plan))
        return unet
