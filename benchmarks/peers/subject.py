"""The bundled pipeline with its captions, examiners and full-precision pictures."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mixdq_ao.app.measure import Exam
from mixdq_ao.app.quiet import silence_loading_bars
from mixdq_ao.app.subject import bundled
from mixdq_ao.models.pipelines import Sampling, generate_all

STEPS = (1, 4)


class Subject:
    """``test``: captions judged, none of them seen in training; 32 others calibrate."""

    def __init__(self, test: int) -> None:
        shapes = bundled()
        silence_loading_bars()
        self.pipe = shapes.load_pipeline()
        self.calibrating = [p.text for p in shapes.prompts(32, seed=55)]
        chosen, scorer = shapes.prompts(test, seed=2026, held_out=True), shapes.load_scorer()
        texts, specs = [p.text for p in chosen], [p.spec for p in chosen]
        self.exams = {s: Exam(texts, specs, scorer, Sampling(steps=s, seed=10_000, batch_size=32)) for s in STEPS}
        self.references = {steps: self._pictures(self.pipe.unet, steps) for steps in STEPS}

    def with_unet(self, unet: nn.Module) -> Any:
        """The pipeline with another UNet; shares everything else."""
        pipe = copy.copy(self.pipe)
        object.__setattr__(pipe, "unet", unet)
        return pipe

    def _pictures(self, unet: nn.Module, steps: int) -> Tensor:
        exam = self.exams[steps]
        return generate_all(self.with_unet(unet), list(exam.prompts), exam.sampling)

    def judged(self, count: int) -> list[str]:
        """Captions to choose between plans by: neither calibrated on nor graded."""
        return [p.text for p in bundled().prompts(count, seed=77)]

    def draw(self, unet: nn.Module, prompts: list[str]) -> None:
        """Generations at every judged number of steps, for calibration."""
        for steps in STEPS:
            generate_all(self.with_unet(unet), prompts, Sampling(steps=steps, batch_size=32), "latent")

    def calls(self, unet: nn.Module, prompts: list[str], batch: int = 8) -> list[dict[str, Any]]:
        """The UNet's arguments and full-precision results in a one-step generation, a batch at a time."""
        seen: list[dict[str, Any]] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
            seen.append({"inputs": {"sample": args[0], "timestep": args[1], **kwargs}, "output": output[0]})

        handle = unet.register_forward_hook(hook, with_kwargs=True)
        try:
            generate_all(self.with_unet(unet), prompts, Sampling(batch_size=batch), "latent")
        finally:
            handle.remove()
        return seen

    def grade(self, unet: nn.Module) -> dict[str, dict[str, float | None]]:
        """Figures of pictures against full precision, by number of steps."""
        return {str(s): exam.grade(self._pictures(unet, s), self.references[s]) for s, exam in self.exams.items()}


def simulated_bytes(model: nn.Module) -> int:
    """Bytes a model of fake-quantized weights would take: each linear and convolution weight at the bits its ModelOpt
    quantizer has (all of them where it is off), one float32 scale per output channel, everything else as it is."""
    quantized = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    rest -= sum(m.weight.numel() * m.weight.element_size() for m in quantized)
    weights = sum(m.weight.numel() * _bits(m) // 8 + 4 * m.weight.shape[0] for m in quantized)
    return weights + rest


def _bits(module: nn.Linear | nn.Conv2d) -> int:
    quantizer: Any = getattr(module, "weight_quantizer", None)
    return quantizer.num_bits if quantizer is not None and quantizer.is_enabled else 8 * module.weight.element_size()


def latency_inputs(subject: Subject, batch: int) -> dict[str, Any]:
    """One call of the UNet with ``batch`` captions."""
    prompts = list(subject.exams[1].prompts[:batch])
    with torch.no_grad():
        return subject.calls(subject.pipe.unet, prompts, batch)[0]["inputs"]
