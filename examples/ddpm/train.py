"""Trains the unconditional DDPM from scratch: `python -m examples.ddpm.train`. A killed run continues when repeated."""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from examples.ddpm.data import pictures
from examples.ddpm.models import make_scheduler, make_unet
from examples.shapes.training import Recipe, channels_last, fit, generators
from mixdq_ao.progress import console, progress

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Recipe(steps=3600, batch=32, lr=2e-3, average=0.998, seed=8)


def velocity_error(unet: UNet2DModel, scheduler: DDPMScheduler, images: Tensor, noise: torch.Generator) -> Tensor:
    """Mean squared error of the velocity predicted for images [B, 3, 16, 16] in [0, 1], noised at random steps."""
    x = images * 2 - 1
    grains = torch.randn(x.shape, generator=noise)
    t = cast(Any, torch.randint(scheduler.config["num_train_timesteps"], (len(x),), generator=noise))
    noised = scheduler.add_noise(x, grains, t).contiguous(memory_format=torch.channels_last)
    return F.mse_loss(unet(noised, t).sample, scheduler.get_velocity(x, grains, t))


def train_unet(
    checkpoint: Path, report: Callable[[int, int, str], None], recipe: Recipe = RECIPE
) -> tuple[UNet2DModel, dict]:
    """Returns the trained UNet and the seconds of training, including those of killed runs."""
    torch.manual_seed(recipe.seed)
    unet, scheduler = channels_last(make_unet()), make_scheduler()

    def loss(step: int) -> Tensor:
        rng, noise = generators(recipe, step)
        return velocity_error(unet, scheduler, pictures(recipe.batch, rng), noise)

    run = fit(unet, loss, recipe, checkpoint=checkpoint, report=report)
    return unet, {"seconds": run.seconds}


def save(unet: UNet2DModel, directory: Path) -> None:
    """Writes the finished pipeline in fp16, without the paths of this machine."""
    pipe = DDPMPipeline(unet=unet, scheduler=cast(Any, make_scheduler()))
    pipe.to(torch.float16).save_pretrained(directory)
    path = directory / "unet" / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _reporter(advance: Callable[[int, str], None]) -> Callable[[int, int, str], None]:
    """A function that advances the progress bar, or in a log file prints a line per tenth."""
    seen = [0, -1]

    def report(step: int, steps: int, text: str) -> None:
        advance(step - seen[0], text)
        seen[0], tenth = step, 10 * step // steps
        if tenth > seen[1] and not console.is_terminal:
            console.print(f"{time.strftime('%X')} {step}/{steps} {text}", highlight=False)
        seen[1] = max(tenth, seen[1])

    return report


def main() -> None:
    """Trains to the end of the recipe and writes the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "ddpm", help="folder of everything that is made")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ship", action="store_true", help="then copy the weights into the repository")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with progress("training", RECIPE.steps) as bar:
        unet, measured = train_unet(options.out / "checkpoint.pt", _reporter(bar.advance))
    save(unet, options.out / "pipeline")
    print(measured)
    if options.ship:
        shutil.copytree(options.out / "pipeline", Path(__file__).parent / "pipeline", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
