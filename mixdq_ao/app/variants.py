"""The plans the demo compares, from naive to allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

from torch import nn

from ..errors import AllocationError
from ..plan import Plan
from ..search.allocate import allocate, sweep
from ..search.allocation import Allocation
from ..search.calibration import Calibration
from ..search.objectives import OBJECTIVES
from ..search.pareto import undominated
from ..search.prediction import with_measured
from ..search.sensitivity import Sensitivity


@dataclass(frozen=True, slots=True)
class Judgement:
    """Measured quality of a plan: PSNR of the pictures in dB, and relative error power of the denoiser's output."""

    psnr: float
    error: float


Judge = Callable[[Plan], Judgement]
PARETO_BITS = (2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0, 6.0)


@dataclass(frozen=True, slots=True)
class Choice:
    """An allocation, the objective it was solved for, and its quality measured on a few prompts."""

    objective: str
    allocation: Allocation
    judged: Judgement


class Variants:
    """Builds plans for one model from one calibration and one sensitivity analysis."""

    def __init__(self, model: nn.Module, calibration: Calibration, sensitivity: Sensitivity, judge: Judge) -> None:
        self.model, self.calibration, self.sensitivity, self.judge = model, calibration, sensitivity, judge

    def naive(self, weight_bits: int) -> Plan:
        """Every layer min-max, BOS rows inside the range, concatenations in one range."""
        return Plan.uniform(self.model, weight_bits, 8).with_calibration(self.calibration, bos=False, split=False)

    def bos(self, weight_bits: int) -> Plan:
        """As ``naive``, but with BOS rows handled separately and concatenated shortcuts split."""
        return Plan.uniform(self.model, weight_bits, 8).with_calibration(self.calibration)

    def protected(self) -> tuple[str, ...]:
        """The 1 % of layers whose 8-bit activation hurts most; MixDQ keeps them in 16 bits."""
        errors = {n: v.act_errors[8] for n, v in self.sensitivity.layers.items()}
        return tuple(sorted(errors, key=errors.__getitem__, reverse=True)[: ceil(0.01 * len(errors))])

    def w8a8(self) -> Plan:
        """8 bits everywhere but in the protected layers."""
        plan = allocate(self.sensitivity, weight_bits=8, act_bits=8, protect=self.protected()).plan
        plan = plan.with_calibration(self.calibration)
        return with_measured(plan, self.judge(plan).error)

    def choices(self, weight_bits: float) -> list[Choice]:
        """For every objective the candidate at this average with the best measured quality."""
        found = []
        for objective in OBJECTIVES:
            candidates = self._candidates(weight_bits, objective)
            judged = [(self.judge(a.plan.with_calibration(self.calibration)), a) for a in candidates]
            if judged:
                score, best = max(judged, key=lambda pair: pair[0].psnr)
                found.append(Choice(objective, best, score))
        return found

    def _candidates(self, weight_bits: float, objective: str) -> list[Allocation]:
        """Allocations of one objective; none if it has no solution (4-bit quality layers at 3 bits on average)."""
        try:
            return undominated(sweep(self.sensitivity, weight_bits=weight_bits, objective=objective))
        except AllocationError:
            return []

    def plan(self, choice: Choice) -> Plan:
        """The plan of a choice with its ranges, and its measured error in the metadata beside the predicted one."""
        return with_measured(choice.allocation.plan.with_calibration(self.calibration), choice.judged.error)


def best(choices: list[Choice]) -> Choice:
    """The choice whose pictures were closest to full precision."""
    return max(choices, key=lambda c: c.judged.psnr)


def summaries(plans: Mapping[str, Plan], model: nn.Module) -> dict[str, dict[str, float]]:
    """{plan: its average weight and activation bits}."""
    figures = {name: plan.summary(model) for name, plan in plans.items()}
    return {
        name: {"average_weight_bits": s.average_weight_bits, "average_act_bits": s.average_act_bits}
        for name, s in figures.items()
    }
