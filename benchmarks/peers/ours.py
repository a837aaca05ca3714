"""Our plans: sensitivities from random probes, the rounding of each layer by its output error, HiGHS."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn

from mixdq_ao import Plan, allocate, analyze, calibrate, input_moments, mixdq_config, quantize_

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
        self.seconds = kept_seconds(work / "probes.json", time.process_time() - start)

    def plan(self, weight_bits: float, act_bits: float = 8) -> Plan:
        """The plan of the least predicted error at so many bits on average; activations have 8 or 16."""
        budgets = {"weight_bits": weight_bits, "act_bits": act_bits, "act_choices": (8, 16)}
        found = allocate(self.sensitivity, objective="additive", **budgets)
        return found.plan.with_calibration(self.calibration)

    def quantize(self, unet: nn.Module, plan: Plan) -> nn.Module:
        quantize_(unet, mixdq_config(plan, moments=self.moments))
        return unet
