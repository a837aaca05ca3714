"""The interface of this example: the shipped pipeline, prompts for it, and the scorer."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from examples.shapes.data import Spec, caption, draw_spec
from examples.shapes.models import LATENT_SHAPE
from examples.shapes.scorer import Agreement, Scorer

__all__ = [
    "LATENT_SHAPE",
    "PIPELINE",
    "SCORER",
    "Agreement",
    "Prompt",
    "Scorer",
    "load_pipeline",
    "load_scorer",
    "prompts",
]
PIPELINE = Path(__file__).parent / "pipeline"
SCORER = Path(__file__).parent / "scorer.safetensors"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A caption and the spec its picture must show."""

    text: str
    spec: Spec


def prompts(n: int, *, seed: int, held_out: bool = False) -> list[Prompt]:
    """`n` random prompts; the held-out ones describe pictures that no part of the pipeline was trained on."""
    rng = random.Random(seed)
    specs = [draw_spec(rng, held_out=held_out) for _ in range(n)]
    return [Prompt(caption(spec, rng), spec) for spec in specs]


def load_pipeline(dtype: torch.dtype = torch.float32, *, path: Path = PIPELINE) -> StableDiffusionXLPipeline:
    """The trained pipeline, computing in `dtype`, without a progress bar per call."""
    pipe = StableDiffusionXLPipeline.from_pretrained(path, dtype=dtype, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_scorer(path: Path = SCORER) -> Scorer:
    """The trained scorer, in evaluation mode."""
    scorer = Scorer()
    scorer.load_state_dict(load_file(path))  # fp16 on disk, copied into fp32
    return scorer.eval().requires_grad_(False)
