"""Measures how rounding each layer at each denoising step changes the final picture, for bits per layer *and* step.

For one weight or activation at a time, on the inputs of the full-precision run, measures the relative error power of
the model's output at each step. The effect of a step's error on the final picture is measured once per step, with all
layers rounded at that step alone. The error programs add up the product of both.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixdq_ao import Calibration, LayerPlan, LayerSensitivity, Sensitivity
from mixdq_ao.layers import find_layers
from mixdq_ao.progress import progress
from mixdq_ao.quantize.config import MixDQLayerConfig, fake_quantizer
from mixdq_ao.quantize.fake import with_fake_quantizer, without_fake_quantizer

WEIGHT_BITS, ACT_BITS = (2, 4, 8), (4, 8)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The recorded calls of a denoiser: timesteps [S], inputs and outputs [S, B, 3, H, W]."""

    timesteps: Tensor
    inputs: Tensor
    outputs: Tensor

    def at(self, steps: Sequence[int]) -> "Trajectory":
        """The trajectory of some of the steps only."""
        chosen = list(steps)
        return replace(self, timesteps=self.timesteps[chosen], inputs=self.inputs[chosen], outputs=self.outputs[chosen])

    @torch.no_grad()
    def again(self, unet: nn.Module) -> Tensor:
        """float64 [S]: relative error power of ``unet``'s outputs on the same inputs, step by step."""
        batch = self.inputs.shape[1]
        answer = unet(self.inputs.flatten(0, 1), self.timesteps.repeat_interleave(batch)).sample
        error = (answer.view_as(self.outputs).double() - self.outputs.double()).square().flatten(1).sum(1)
        return error / self.outputs.double().square().flatten(1).sum(1)


def record(unet: nn.Module, run: Callable[[], object]) -> Trajectory:
    """Records the calls of ``unet`` while ``run`` draws one batch."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, Tensor], output: Any) -> None:
        calls.append((args[1].reshape(()), args[0], output.sample))

    handle = unet.register_forward_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    timesteps, inputs, outputs = (torch.stack(part) for part in zip(*calls, strict=True))
    return Trajectory(timesteps, inputs, outputs)


@contextmanager
def _rounded(name: str, module: nn.Linear | nn.Conv2d, layer: LayerPlan) -> Iterator[None]:
    quantizer = fake_quantizer(MixDQLayerConfig(layer, "fake", None, name))
    quantizer.keep(module.weight)
    with_fake_quantizer(module, quantizer)
    try:
        yield
    finally:
        without_fake_quantizer(module)


def output_errors(
    unet: nn.Module, calls: Trajectory, calibration: Calibration, names: Iterable[str] | None = None
) -> dict[str, dict[str, dict[int, Tensor]]]:
    """{layer: {"weight" or "act": {bits: float64 [S], relative error power of the output with it alone rounded}}}.

    ``names``: the layers to measure; default all.
    """
    every, found = find_layers(unet), {}
    layers = every if names is None else {name: every[name] for name in names}
    with progress("rounding one layer at a time", len(layers)) as bar:
        for name, module in layers.items():
            plans = {("weight", b): LayerPlan(weight_bits=b) for b in WEIGHT_BITS}
            plans |= {("act", b): LayerPlan(act_bits=b) for b in ACT_BITS}
            errors: dict[str, dict[int, Tensor]] = {"weight": {}, "act": {}}
            for (kind, bits), plan in plans.items():
                with _rounded(name, module, calibration.layers[name].plan(plan, bos=False, split=True)):
                    errors[kind][bits] = calls.again(unet)
            found[name] = errors
            bar.advance(note=name)
    return found


def step_sensitivities(
    layers: Mapping[str, LayerSensitivity],
    errors: Mapping[str, Mapping[str, Mapping[int, Tensor]]],
    factors: Mapping[int, float],
) -> dict[int, Sensitivity]:
    """{step: Sensitivity} for ``allocate_steps``: errors times the step's factor (steps in the order of the calls).

    ``layers``: their sizes, as in an ``Orthogonality``.
    """
    return {step: Sensitivity(_scaled(layers, errors, i, f)) for i, (step, f) in enumerate(factors.items())}


def _scaled(
    layers: Mapping[str, LayerSensitivity],
    errors: Mapping[str, Mapping[str, Mapping[int, Tensor]]],
    place: int,
    factor: float,
) -> dict[str, LayerSensitivity]:
    tables = {
        name: {f"{kind}_errors": {b: e[place].item() * factor for b, e in t.items()} for kind, t in kinds.items()}
        for name, kinds in errors.items()
    }
    return {name: replace(layers[name], **cast(dict[str, Any], table)) for name, table in tables.items()}
