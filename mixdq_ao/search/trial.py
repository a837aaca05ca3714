"""Trials: compares the output of a pipeline with one layer quantized to its output in full precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SensitivityError
from ..layer_plan import LayerPlan
from ..layers import find_layers
from ..models.outputs import denoised
from ..models.pipelines import Sampling, check_prompts, each_frame, generate_all, text_encoders
from ..quantize.config import MixDQLayerConfig, fake_quantizer
from ..quantize.fake import become, with_fake_quantizer, without_fake_quantizer
from .batches import batches
from .metrics import ssim
from .replay import Recorder, replayable
from .watch import denoiser_of, eager, hooked


@dataclass(frozen=True, slots=True)
class Output:
    """The outputs of one batch: the denoiser's at every step [steps, B, ...] (flattened, [1, n], where calls differ in
    shape), and pictures [B, 3, H, W] (videos [B, F, 3, H, W]) or None."""

    denoised: Tensor
    images: Tensor | None


def run(pipe: Any, prompts: list[str], sampling: Sampling, *, images: bool) -> Output:
    """Samples ``prompts`` as one batch and keeps the denoiser's output of every step."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(denoised(output).detach())

    with hooked(denoiser_of(pipe).register_forward_hook(keep)), eager():
        result = generate_all(pipe, prompts, sampling, "pt" if images else "latent")
    if len({y.shape for y in outputs}) > 1:  # calls of several batch sizes, as for several kinds of guidance
        outputs = [torch.cat([y.flatten() for y in outputs])]
    return Output(torch.stack(outputs), result if images else None)


def signal_power(outputs: Iterable[Tensor]) -> float:
    """Sum of squares of the denoiser's outputs, which errors are relative to. Raises SensitivityError unless it is
    finite and above 0."""
    power = sum(y.detach().double().square().sum().item() for y in outputs)
    if not (math.isfinite(power) and power > 0):
        raise SensitivityError(f"the denoiser's output has power {power}, expected finite and above 0")
    return power


@contextmanager
def rounding(module: nn.Linear | nn.Conv2d, config: MixDQLayerConfig) -> Iterator[None]:
    """Inside the block the layer rounds as ``config`` says, in floating point; then its class and, where it was in fake
    mode before, its quantizer are restored."""
    quantizer = fake_quantizer(config)
    quantizer.keep(module.weight)
    before, own = type(module), module._modules.get("quantizer")
    with_fake_quantizer(module, quantizer)
    try:
        yield
    finally:
        become(without_fake_quantizer(module), before)
        if own is not None:
            module.quantizer = own


@dataclass(slots=True)
class _Batch:
    prompts: list[str]
    sampling: Sampling
    recorder: Recorder
    reference: Output


class Trials:
    """The reference run of a pipeline over prompts, and runs with one layer fake-quantized.

    Prompts run in batches. The reference of each batch is recorded once, and with ``replay`` a trial of a layer
    computes only what comes after that layer's first call.

    Raises SensitivityError where the denoiser's output is zero or not finite.
    """

    def __init__(
        self, pipe: Any, prompts: Sequence[str], sampling: Sampling, *, replay: bool = True, budget: int = 4 << 30
    ) -> None:
        self.pipe, self.model, self.use_replay = pipe, denoiser_of(pipe), replay
        self.layers = find_layers(self.model)
        prompts = check_prompts(prompts)
        modules: dict[str, nn.Module] = replayable(self.model) | text_encoders(pipe)
        self.batches: list[_Batch] = []
        for part, seeded in batches(prompts, sampling):
            recorder = Recorder(modules if replay else self.layers, budget // (1 + len(prompts) // sampling.batch_size))
            with recorder.record():
                reference = self._run(part, seeded, images=True)
            self.batches.append(_Batch(part, seeded, recorder, reference))
        self.power = signal_power(batch.reference.denoised for batch in self.batches)

    def _run(self, prompts: list[str], sampling: Sampling, images: bool) -> Output:
        return run(self.pipe, prompts, sampling, images=images)

    def measure(
        self,
        name: str,
        layer: LayerPlan,
        bos_embedding: Tensor | None,
        *,
        images: bool,
        moment: Tensor | None = None,
    ) -> dict[str, float]:
        """Runs all batches with one layer in fake mode.

        Returns:
            "error": relative error power of the denoiser's output, sum (y - yq)^2 / sum y^2 over all prompts and
            steps; "ssim", with ``images``: mean SSIM of the decoded pictures.
        """
        noise = similarity = 0.0
        with self._changed(name, layer, bos_embedding, moment):
            for batch in self.batches:
                with batch.recorder.replay(name) if self.use_replay else nullcontext():
                    output = self._run(batch.prompts, batch.sampling, images)
                noise += (output.denoised.double() - batch.reference.denoised.double()).square().sum().item()
                if output.images is not None and batch.reference.images is not None:
                    alike = ssim(each_frame(output.images), each_frame(batch.reference.images))
                    similarity += alike.sum().item() * (len(batch.prompts) / len(alike))
        result = {"error": noise / self.power}
        if images:
            result["ssim"] = similarity / sum(len(b.prompts) for b in self.batches)
        return result

    @contextmanager
    def _changed(
        self, name: str, layer: LayerPlan, bos_embedding: Tensor | None, moment: Tensor | None = None
    ) -> Iterator[None]:
        config = MixDQLayerConfig(layer, "fake", bos_embedding if layer.bos else None, name, moment)
        with rounding(self.layers[name], config):
            yield

    def called(self) -> list[str]:
        """The layers the reference run called, in order of their first call."""
        calls = self.batches[0].recorder.calls
        return sorted((n for n in self.layers if calls[n]), key=lambda n: calls[n][0].start)
