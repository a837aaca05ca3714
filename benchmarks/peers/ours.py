"""Our plans at given bytes: sensitivities from random probes, the rounding of each layer by its output error, HiGHS."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn

from mixdq_ao import Plan, allocate, analyze, calibrate, input_moments, mixdq_config, quantize_

from ..held import model_bytes
from .subject import STEPS, Subject

ROUNDINGS = ("minmax nearest", "output nearest", "output compensated")


class Ours:
    """``seconds``: of everything before the integer program."""

    def __init__(self, subject: Subject, store: Path) -> None:
        start = time.perf_counter()
        texts = subject.calibrating
        self.calibration = calibrate(subject.pipe, texts, steps=STEPS)
        self.moments = input_moments(subject.pipe, texts, calibration=self.calibration, steps=STEPS)
        self.sensitivity = analyze(
            subject.pipe, texts[:8], store=store, method="probe", calibration=self.calibration, batch_size=8, probes=8,
            roundings=ROUNDINGS, moments=self.moments, act_bits=(8,),
        )  # fmt: skip
        self.seconds = time.perf_counter() - start
        unet = subject.pipe.unet
        layers = (m for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d))
        self.rest = model_bytes(unet) - sum(4 * m.weight.numel() for m in layers)

    def plan(self, size: int) -> Plan:
        """The plan of the least predicted error whose model holds at most ``size`` bytes."""
        found = allocate(self.sensitivity, weight_bytes=size - self.rest, act_bits=8, objective="additive")
        return found.plan.with_calibration(self.calibration)

    def quantize(self, unet: nn.Module, plan: Plan) -> nn.Module:
        quantize_(unet, mixdq_config(plan, moments=self.moments))
        return unet
