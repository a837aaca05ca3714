"""How long each layer takes at each precision, measured on this machine: the table that a limit of seconds needs."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..layer_plan import LayerPlan
from ..layers import find_layers
from ..progress import progress
from ..quantize.config import MixDQLayerConfig, quantize_
from .calibration import Calibration
from .limits import Pair
from .watch import model_of, watched


@torch.no_grad()
def layer_latencies(
    model: nn.Module,
    calibration: Calibration,
    run: Callable[[], object],
    *,
    weight_bits: Sequence[int] = (2, 4, 8),
    act_bits: Sequence[int] = (8,),
    rounds: int = 7,
    wrap: Callable[[nn.Module], Callable[[Tensor], Any]] = lambda layer: layer,
) -> dict[tuple[str, int, int], float]:
    """{(layer, weight bits, activation bits): seconds of all its calls in one run}, for ``Limits.latency``.

    Layers of the same kind, split, BOS treatment and input shape share one measurement, the median of ``rounds``. The
    precisions of a layer are timed in turn, so that a machine whose speed drifts slows all of them alike. (16, 16) is
    always among them.

    Args:
        run: calls the model once, with the batch and resolution it will be used with.
        wrap: makes the timed callable from a layer, for instance ``torch.compile``; default: the layer itself, eager.

    Raises:
        CalibrationError: ``run`` calls no linear or convolution layer that was calibrated.
    """
    model = model_of(model)
    calls = _calls(model, calibration, run)
    calibration = calibration.of_folded_model()  # folding changes weights only, which takes no time
    pairs = [(16, 16), *((w, a) for w in sorted(set(weight_bits)) for a in sorted(set(act_bits)))]
    known: dict[Any, dict[Pair, float]] = {}
    table: dict[tuple[str, int, int], float] = {}
    layers = find_layers(model)
    with progress("timing layers", len(calls)) as bar:
        for name, inputs in calls.items():
            for x in inputs:
                key = (_kind(layers[name]), _treatment(calibration, name), tuple(x.shape), x.stride(), x.dtype)
                if key not in known:
                    known[key] = _timed(layers[name], name, calibration, x, pairs, rounds, wrap)
                for (w, a), seconds in known[key].items():
                    table[name, w, a] = table.get((name, w, a), 0.0) + seconds
            bar.advance(note=name)
    return table


def _calls(model: nn.Module, calibration: Calibration, run: Callable[[], object]) -> dict[str, list[Tensor]]:
    """{layer: an input for each of its calls}, of calibrated layers; inputs of equal shape, strides and dtype are one
    tensor."""
    calls: dict[str, list[Tensor]] = {}
    shared: dict[Any, Tensor] = {}

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        calls.setdefault(name, []).append(shared.setdefault((tuple(x.shape), x.stride(), x.dtype), x.detach()))

    with watched(model, [name for name in find_layers(model) if name in calibration.layers], see):
        run()
    if not calls:
        raise CalibrationError("run called no calibrated linear or convolution layer; calibrate with the same model")
    return calls


def _kind(module: nn.Linear | nn.Conv2d) -> Any:
    shape = tuple(module.weight.shape), module.bias is None
    if isinstance(module, nn.Linear):
        return shape
    return *shape, module.stride, module.padding, module.dilation, module.groups


def _treatment(calibration: Calibration, name: str) -> Any:
    layer = calibration.layers[name]
    return layer.split, layer.prompt_range is not None


def _timed(
    module: nn.Linear | nn.Conv2d,
    name: str,
    calibration: Calibration,
    x: Tensor,
    pairs: Sequence[Pair],
    rounds: int,
    wrap: Callable[[nn.Module], Callable[[Tensor], Any]],
) -> dict[Pair, float]:
    variants = {pair: wrap(_quantized(module, name, calibration, pair)) for pair in pairs}
    times: dict[Pair, list[float]] = {pair: [] for pair in pairs}
    for i in range(rounds + 1):
        for pair, call in variants.items():
            _wait(x)
            start = time.perf_counter()
            call(x)
            _wait(x)
            if i > 0:  # the first round warms up: it compiles and fills caches
                times[pair].append(time.perf_counter() - start)
    return {pair: statistics.median(t) for pair, t in times.items()}


def _quantized(module: nn.Linear | nn.Conv2d, name: str, calibration: Calibration, pair: Pair) -> nn.Module:
    """A quantized copy of the layer, with its calibrated ranges, split and BOS treatment."""
    layer = copy.deepcopy(module)
    if pair != (16, 16):
        plan = calibration.layers[name].plan(LayerPlan(weight_bits=pair[0], act_bits=pair[1]), bos=True, split=True)
        bos = calibration.bos_tensor(module.weight.device) if plan.bos else None
        quantize_(layer, MixDQLayerConfig(plan, "real", bos, name), filter_fn=lambda m, _: m is layer)
    return layer


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
