"""The optimizers under a short name: ``from mixdq_ao.optim import MemoryEfficientAdamW``.

What they do is described in ``mixdq_ao.training.optim``; steps inside backward in ``mixdq_ao.training.in_backward``.
"""

from __future__ import annotations

from .training.in_backward import InBackward
from .training.loss_scale import LossScale
from .training.optim import MemoryEfficientAdamW, MemoryEfficientSGD

__all__ = ["InBackward", "LossScale", "MemoryEfficientAdamW", "MemoryEfficientSGD"]
