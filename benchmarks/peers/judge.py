"""Candidates for one budget, judged by pictures of captions that neither the search nor the table uses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cached_property

from torch import Tensor, nn

from mixdq_ao import Plan
from mixdq_ao.models.pipelines import Sampling, generate_all
from mixdq_ao.search.metrics import psnr

from .subject import STEPS, Subject

JUDGED = 16


class Judge:
    """``quantize``: what makes a full-precision UNet one of a plan, in place."""

    def __init__(self, subject: Subject, quantize: Callable[[nn.Module, Plan], nn.Module]) -> None:
        self.subject, self.quantize, self.texts = subject, quantize, subject.judged(JUDGED)

    @cached_property
    def _reference(self) -> list[Tensor]:
        """Drawn for the first plan that is judged; many budgets have one candidate alone."""
        return self._pictures(self.subject.pipe.unet)

    def _pictures(self, unet: nn.Module) -> list[Tensor]:
        pipe = self.subject.with_unet(unet)
        return [generate_all(pipe, self.texts, Sampling(steps=s, seed=500, batch_size=JUDGED)) for s in STEPS]

    def _quality(self, plan: Plan) -> float:
        """Mean PSNR at every judged number of steps."""
        drawn = self._pictures(self.quantize(copy.deepcopy(self.subject.pipe.unet), plan))
        return sum(psnr(a, b).mean().item() for a, b in zip(drawn, self._reference, strict=True)) / len(drawn)

    def best(self, plans: Iterable[Plan]) -> Plan:
        """The plan whose pictures are the closest to full precision."""
        return max(plans, key=self._quality)
