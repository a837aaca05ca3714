"""A moving average of parameters, which can temporarily replace them in the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """Exponential moving averages, float32, of named parameters.

    At step n the decay is at most (1 + n) / (10 + n), so that the initial values are forgotten. With a decay of 0
    nothing is stored: the average is the parameters themselves.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = {n: p.detach().float().clone() for n, p in parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, exact: Mapping[str, Tensor], steps: int) -> None:
        """Adds ``exact``, the float32 values of the parameters, to the averages, after step number ``steps``."""
        weight = 1 - min(self.decay, (1 + steps) / (10 + steps))
        for name, value in self.values.items():
            value.lerp_(exact[name], weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold the average. Their memory is exchanged, not written to, so their version
        counters do not change."""
        own = {n: self.parameters[n].data for n in self.values}
        try:
            for name, value in self.values.items():
                self.parameters[name].data = value.to(own[name].dtype)
            yield
        finally:
            for name, data in own.items():
                self.parameters[name].data = data

    def now(self) -> dict[str, Tensor]:
        """A copy of the averages, or of the parameters where nothing is averaged."""
        source = self.values or self.parameters
        return {n: v.detach().float().clone() for n, v in source.items()}
