"""Caption agreement of the pipeline: `python -m examples.shapes.evaluate`."""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import StableDiffusionXLPipeline
from rich.progress import track
from torch import Tensor

from examples.shapes.pictures import save_grid
from examples.shapes.subject import (
    LATENT_SHAPE,
    PIPELINE,
    SCORER,
    Prompt,
    load_pipeline,
    load_scorer,
    prompts,
)

SCHEDULERS = ("DDIM", "EulerAncestralDiscrete", "EulerDiscrete", "LCM")
KEPT = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "timestep_spacing",
)


def set_scheduler(pipe: StableDiffusionXLPipeline, name: str) -> None:
    """Gives `pipe` another of `SCHEDULERS`, with the noise schedule it was trained on."""
    config = {key: pipe.scheduler.config[key] for key in (*KEPT, "rescale_betas_zero_snr")}
    extra = {"clip_sample": False} if name in ("DDIM", "LCM") else {}
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler")(**config, **extra)


@torch.no_grad()
def generate(
    pipe: StableDiffusionXLPipeline,
    texts: list[str],
    *,
    steps: int,
    guidance: float = 0.0,
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """Pictures [B, 3, 64, 64] in [0, 1] for `texts`, from seeded noise."""
    noise = torch.randn(len(texts), *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed)).to(pipe.dtype)
    draw = cast(Any, pipe)  # diffusers' hints do not know of output_type
    images = [
        draw(
            prompt=texts[i : i + batch],
            latents=noise[i : i + batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
            generator=torch.Generator().manual_seed(seed + i),
        ).images
        for i in range(0, len(texts), batch)
    ]
    return torch.cat(images).float()


def bos_figures(pipe: StableDiffusionXLPipeline, texts: list[str]) -> dict[str, float]:
    """Measures how large BOS is against the other rows of the UNet's text input, and how little captions differ.

    `content_rms` is the deviation, by channel, from the mean over captions and positions; `step` is the size of one of
    the 255 steps of a per-tensor quantizer over the range that BOS forces on it.
    """
    with torch.no_grad():
        encode = cast(Any, pipe.encode_prompt)  # diffusers' hint is one prompt
        states = encode(texts, do_classifier_free_guidance=False)[0].float()
    bos, others = states[:, 0], states[:, 1:]
    return {
        "bos_max": bos.abs().max().item(),
        "other_max": others.abs().max().item(),
        "ratio": (bos.abs().max() / others.abs().max()).item(),
        "content_rms": (others - others.mean((0, 1))).square().mean().sqrt().item(),
        "step": ((states.max() - states.min()) / 255).item(),
    }


@contextmanager
def rounded_text(pipe: StableDiffusionXLPipeline, bits: int = 8) -> Iterator[None]:
    """Rounds the UNet's text input over its whole range, as a quantizer without separate BOS handling does."""

    def round_states(unet, positional, named):
        x = named["encoder_hidden_states"]
        scale = (x.max() - x.min()) / (2**bits - 1)
        zero = (-x.min() / scale).round()
        return positional, named | {"encoder_hidden_states": ((x / scale + zero).round() - zero) * scale}

    handle = pipe.unet.register_forward_pre_hook(round_states, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def table(
    pipe: StableDiffusionXLPipeline, chosen: list[Prompt], steps: Iterable[int], scorer: Path, guidance: float
) -> None:
    """Prints one row of agreements per number of steps."""
    judge, texts, specs = load_scorer(scorer), [p.text for p in chosen], [p.spec for p in chosen]
    for n in track(list(steps), description=type(pipe.scheduler).__name__, transient=True):
        found = judge.agreement(generate(pipe, texts, steps=n, guidance=guidance), specs)
        kinds = " ".join(f"{kind} {value:.4f}" for kind, value in found.per.items())
        print(f"| {type(pipe.scheduler).__name__} | {n} | {found.all:.4f} | {kinds} |", flush=True)


def main() -> None:
    """Prints agreement on held-out captions and BOS's figures; can also write a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--scorer", type=Path, default=SCORER)
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance where above 1")
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=["DDIM"])
    parser.add_argument("--round-text", action="store_true", help="with the UNet's text input rounded to 8 bits")
    parser.add_argument("--grid", type=Path, help="write a PNG of the first 16 pictures at 1 and 4 steps")
    options = parser.parse_args()
    pipe = load_pipeline(path=options.pipeline)
    chosen = prompts(options.captions, seed=2024, held_out=True)
    print({k: round(v, 4) for k, v in bos_figures(pipe, [p.text for p in chosen]).items()})
    with rounded_text(pipe) if options.round_text else nullcontext():
        for name in options.schedulers:
            set_scheduler(pipe, name)
            table(pipe, chosen, options.steps, options.scorer, options.guidance)
    if options.grid:
        texts = [p.text for p in chosen[:16]]
        save_grid(torch.cat([generate(pipe, texts, steps=n) for n in (1, 4)]), texts, options.grid)


if __name__ == "__main__":
    main()
