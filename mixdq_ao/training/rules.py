"""The arithmetic of one step on float32 values: AdamW and SGD, operation by operation as torch.optim does it.

The reference is torch's for-loop implementation (``foreach=False``, ``fused=False``, ``capturable=False``), which is
the default on a CPU. The eager functions call the same operators in the same order on the same values, so they give
the same bits. The compiled ones spell out what those operators compute on a CPU, with their fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .fma import fma

Eager = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[float], tuple[bool, ...]], None]
Compiled = Callable[[Tensor, Tensor, Sequence[Tensor], Tensor, tuple[bool, ...]], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Rule:
    """The step of one kind of optimizer.

    Attributes:
        moments: {name in the state: whether it is signed}.
        scalars: (group, step counted from 1) -> (numbers in float64, flags that select branches).
        eager: updates the value [n] and the moments (each [n]) in place; all float32.
        compiled: the same, but returns the new value and moments; takes the numbers as one float32 tensor.
    """

    moments: Mapping[str, bool]
    scalars: Callable[[Mapping[str, Any], int], tuple[tuple[float, ...], tuple[bool, ...]]]
    eager: Eager
    compiled: Compiled


def _adamw_scalars(group: Mapping[str, Any], step: int) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
    step_size = lr / (1 - beta1**step)
    correction = (1 - beta2**step) ** 0.5
    numbers = (1 - lr * decay, 1 - beta1, beta2, 1 - beta2, correction, group["eps"], -step_size)
    return numbers, (decay != 0, bool(np.float32(1 - beta1) < 0.5))


def _adamw(p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Sequence[float], facts: tuple[bool, ...]) -> None:
    exp_avg, exp_avg_sq = moments
    keep, weight1, beta2, weight2, correction, eps, step_size = numbers
    if facts[0]:
        p.mul_(keep)
    exp_avg.lerp_(g, weight1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=weight2)
    p.addcdiv_(exp_avg, exp_avg_sq.sqrt().div_(correction).add_(eps), value=step_size)


def _adamw_compiled(
    p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Tensor, facts: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor]]:
    exp_avg, exp_avg_sq = moments
    keep, weight1, beta2, weight2, correction, eps, step_size = numbers.unbind()
    decays, near = facts
    p = p * keep if decays else p
    # lerp starts from the nearer end, ATen/native/Lerp.h
    exp_avg = fma(weight1, g - exp_avg, exp_avg) if near else fma(weight1 - 1, g - exp_avg, g)
    exp_avg_sq = fma(weight2 * g, g, exp_avg_sq * beta2)
    p = p + (step_size * exp_avg) / (exp_avg_sq.sqrt() / correction + eps)
    return p, [exp_avg, exp_avg_sq]


def _sgd_scalars(group: Mapping[str, Any], step: int) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    momentum, decay = group["momentum"], group["weight_decay"]
    numbers = (decay, momentum, 1 - group["dampening"], -float(group["lr"]))
    return numbers, (decay != 0, momentum != 0, step == 1, bool(group["nesterov"]))


def _sgd(p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Sequence[float], facts: tuple[bool, ...]) -> None:
    decay, momentum, weight, step_size = numbers
    decays, has_momentum, first, nesterov = facts
    if decays:
        g = g.add(p, alpha=decay)
    if has_momentum:
        (buffer,) = moments
        if first:
            buffer.copy_(g)
        else:
            buffer.mul_(momentum).add_(g, alpha=weight)
        g = g.add(buffer, alpha=momentum) if nesterov else buffer
    p.add_(g, alpha=step_size)


def _sgd_compiled(
    p: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: Tensor, facts: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor]]:
    decay, momentum, weight, step_size = numbers.unbind()
    decays, has_momentum, first, nesterov = facts
    g = fma(p, decay, g) if decays else g
    if not has_momentum:
        return fma(g, step_size, p), []
    buffer = g if first else fma(g, weight, moments[0] * momentum)
    g = fma(buffer, momentum, g) if nesterov else buffer
    return fma(g, step_size, p), [buffer]


ADAMW = Rule({"exp_avg": True, "exp_avg_sq": False}, _adamw_scalars, _adamw, _adamw_compiled)
SGD = Rule({"momentum_buffer": True}, _sgd_scalars, _sgd, _sgd_compiled)
