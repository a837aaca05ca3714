"""Our plans: sensitivities from random probes, the rounding of each layer by its output error, HiGHS."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from mixdq_ao import Plan, analyze, calibrate, input_moments, mixdq_config, quantize_
from mixdq_ao.search.allocate import sweep

from .judge import Judge
from .kept import kept_seconds
from .subject import STEPS, Subject

ROUNDINGS = ("minmax nearest", "output nearest", "output compensated")


class Ours:
    """``seconds``: of one core, for everything before the integer program."""

    def __init__(self, subject: Subject, work: Path) -> None:
        start = time.process_time()
        texts = subject.calibrating
        self.calibration = calibrate(subject.pipe, texts, steps=STEPS)
        self.moments = input_moments(subject.pipe, texts, calibration=self.calibration, steps=STEPS)
        self.sensitivity = analyze(
            subject.pipe, texts[:8], store=work / "probes.jsonl", method="probe", calibration=self.calibration,
            batch_size=8, probes=8, roundings=ROUNDINGS, moments=self.moments, act_bits=(8,),
        )  # fmt: skip
        self.judge = Judge(subject, self.quantize)
        self.seconds = kept_seconds(work / "probes.json", time.process_time() - start)

    def plan(self, weight_bits: float, act_bits: Sequence[float] = (8,)) -> Plan:
        """The plan of the least predicted error at so many bits on average; activations have 8 or 16, and of several
        budgets for them the one of the closest pictures."""
        budgets = {"weight_bits": weight_bits, "act_bits": act_bits, "act_choices": (8, 16)}
        found = sweep(self.sensitivity, objective="additive", **budgets)
        plans = [a.plan.with_calibration(self.calibration) for a in found]
        return plans[0] if len(plans) == 1 else self.judge.best(plans)

    def quantize(self, unet: nn.Module, plan: Plan) -> nn.Module:
        quantize_(unet, mixdq_config(plan, moments=self.moments))
        return unet
