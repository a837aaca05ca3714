"""The optimizers under a short name: ``from mixdq_ao.optim import MemoryEfficientAdamW``.

``mixdq_ao.training.optim`` documents them, ``mixdq_ao.training.in_backward`` steps inside backward.
"""

from __future__ import annotations

from .training.in_backward import InBackward
from .training.loss_scale import LossScale
from .training.optim import MemoryEfficientAdamW, MemoryEfficientSGD

__all__ = ["InBackward", "LossScale", "MemoryEfficientAdamW", "MemoryEfficientSGD"]
