"""The interface of this example: the shipped pipeline, pictures from seeded noise, and their features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline
from torch import Tensor

from examples.ddpm.data import catalogue, framed
from examples.shapes.scorer import Scorer
from examples.shapes.subject import load_scorer

__all__ = ["PIPELINE", "Prompted", "draw", "features", "likeness", "load_pipeline", "load_scorer"]
PIPELINE = Path(__file__).parent / "pipeline"


def load_pipeline(dtype: torch.dtype = torch.float32, *, path: Path = PIPELINE) -> DDIMPipeline:
    """The trained pipeline with DDIM's deterministic steps (saved as a `DDPMPipeline`), without a bar per call."""
    pipe = DDIMPipeline.from_pretrained(path, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Prompted:
    """Wraps an unconditional pipeline for functions that draw prompts (`orthogonality`, `GenerationError`, ...). Only
    the number of prompts matters. Latents are the pictures themselves."""

    def __init__(self, pipe: DDIMPipeline) -> None:
        self.unet, self.scheduler, self._pipe = pipe.unet, pipe.scheduler, pipe

    def __call__(self, *, prompt: list[str], generator: Any, num_inference_steps: int, **others: Any) -> Any:
        options: dict[str, Any] = {"num_inference_steps": num_inference_steps, "output_type": "pt"}
        return self._pipe(batch_size=len(prompt), generator=generator, **options)


def draw(pipe: Any, seeds: Sequence[int], *, steps: int, batch: int = 64) -> Tensor:
    """Pictures [B, 3, 16, 16] in [0, 1], each from the noise of its own seed, independent of the batch."""
    seeds = list(seeds)
    drawn = [
        pipe(
            batch_size=len(part),
            generator=[torch.Generator().manual_seed(seed) for seed in part],
            num_inference_steps=steps,
            output_type="pt",
        ).images
        for part in (seeds[i : i + batch] for i in range(0, len(seeds), batch))
    ]
    return torch.cat(drawn).float()


@torch.no_grad()
def features(scorer: Scorer, images: Tensor) -> Tensor:
    """The scorer's penultimate features [B, 192] of images [B, 3, 16, 16], for Fréchet distances."""
    return scorer.features(framed(images))


def likeness(images: Tensor) -> Tensor:
    """The PSNR of images [B, 3, 16, 16] against the nearest picture in `catalogue`, dB [B], at most 100."""
    distance = torch.cdist(images.flatten(1), catalogue().flatten(1)).amin(1)
    return -20 * (distance / images[0].numel() ** 0.5).clamp(min=1e-5).log10()
