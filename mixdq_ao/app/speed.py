"""Times quantized layers against the same layers in floating point on this machine."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..plan import Plan
from ..quantize.config import mixdq_config, quantize_
from ..search.calibrate import calibrate
from .measure import rounds_of

PLANS = {"W8A8": (8, 8), "W4A8": (4, 8), "W2A8": (2, 8), "weights only": (4, 16)}
ROUNDS = 7


class Layer(nn.Module):
    """A module that holds one layer under a name, as plans need it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def _layers() -> dict[str, tuple[Layer, torch.Tensor]]:
    """Layers and inputs of SDXL's sizes: linear 1280 over 1024 tokens, convolution of 320 channels at 32 x 32."""
    linear, conv = nn.Linear(1280, 1280), nn.Conv2d(320, 320, 3, padding=1)
    image = torch.randn(1, 320, 32, 32).to(memory_format=torch.channels_last)
    return {"linear 1280": (Layer(linear), torch.randn(1024, 1280)), "conv 320": (Layer(conv), image)}


@torch.no_grad()
def measure_layers(compiled: bool | None = None) -> dict[str, dict[str, float]]:
    """{"linear 1280": {"float32": ms, "bfloat16": ms, "W8A8": ms, ...}, "conv 320": ...}: medians of timed rounds.

    compiled: use torch.compile; by default on a GPU (where 16 bit is float16) and not on a CPU, where compilation would
    take longer than all the rest.
    """
    cuda = torch.cuda.is_available()
    found: dict[str, dict[str, float]] = {}
    for name, (layer, x) in _layers().items():
        layer, x = (layer.cuda(), x.cuda()) if cuda else (layer, x)
        calls = _calls(
            layer.eval(), x, torch.float16 if cuda else torch.bfloat16, cuda if compiled is None else compiled
        )
        times = rounds_of(calls, rounds=ROUNDS)
        found[name] = {kind: round(statistics.median(t), 3) for kind, t in times.items()}
    return found


def _calls(layer: Layer, x: torch.Tensor, half: torch.dtype, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Calls without arguments of the layer in float32, in 16 bits and quantized by each of PLANS."""
    ready = (lambda m: torch.compile(m, fullgraph=True)) if compiled else (lambda m: m)
    calibration = calibrate(layer, run=lambda: layer(x))
    models: dict[str, tuple[nn.Module, torch.Tensor]] = {"float32": (layer, x)}
    models[str(half).removeprefix("torch.")] = copy.deepcopy(layer).to(half), x.to(half)
    for kind, (weight_bits, act_bits) in PLANS.items():
        plan = Plan.uniform(layer, weight_bits, act_bits).with_calibration(calibration)
        quantized, given = copy.deepcopy(layer), x
        if x.is_cuda:
            quantized, given = quantized.to(half), x.to(half)
        quantize_(quantized, mixdq_config(plan))
        models[kind] = quantized, given
    made = {kind: (ready(model), given) for kind, (model, given) in models.items()}
    calls: dict[str, Callable[[], Any]] = {}
    for kind, (model, given) in made.items():
        calls[kind] = lambda model=model, given=given: _run(model, given)
    return calls


def _run(model: Callable[[torch.Tensor], Any], x: torch.Tensor) -> None:
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize()


def speedups(times: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """{layer: {kind: speed relative to the fastest floating point}}."""
    found = {}
    for name, of in times.items():
        best = min(ms for kind, ms in of.items() if kind not in PLANS)
        found[name] = {kind: best / of[kind] for kind in PLANS}
    return found
