"""The training data of the UNet, computed once, in shards: latents of pictures and embedded captions."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import CLIPTokenizer

from examples.shapes.data import caption, draw_spec, picture
from examples.shapes.progress import write_atomically
from examples.shapes.text import TextEncoders, tokens
from examples.shapes.training import Recipe, generators
from examples.shapes.vae import encode

PICTURES, SHARD = 13_000, 500
RECIPE = Recipe(steps=PICTURES // SHARD, batch=SHARD, lr=0.0, average=0.0, seed=4)


def make_cache(
    directory: Path,
    tokenizer: CLIPTokenizer,
    encoders: TextEncoders,
    vae: AutoencoderKL,
    report: Callable[[int, int, str], None],
    recipe: Recipe = RECIPE,
) -> None:
    """Writes the shards that `directory` lacks.

    A shard has ``latents`` [n, 4, 16, 16], ``states`` [n, 77, 224] (half) and ``pooled`` [n, 128].
    """
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(recipe.steps):
        path = directory / f"{i:03d}.safetensors"
        if not path.exists():
            write_atomically(path, save(_shard(i, tokenizer, encoders, vae, recipe)))
        report(i + 1, recipe.steps, f"{(i + 1) * recipe.batch} pictures")


@torch.no_grad()
def _shard(
    number: int, tokenizer: CLIPTokenizer, encoders: TextEncoders, vae: AutoencoderKL, recipe: Recipe
) -> dict[str, Tensor]:
    rng, _ = generators(recipe, number)
    parts = {"latents": [], "states": [], "pooled": []}
    for start in range(0, recipe.batch, 50):
        specs = [draw_spec(rng) for _ in range(min(50, recipe.batch - start))]
        x = torch.stack([picture(spec, rng) for spec in specs]) * 2 - 1
        states, pooled = encoders(tokens(tokenizer, [caption(spec, rng) for spec in specs]))
        parts["latents"].append(encode(vae, x).mode() * vae.config["scaling_factor"])
        parts["states"].append(states.half())
        parts["pooled"].append(pooled)
    return {name: torch.cat(rows).contiguous() for name, rows in parts.items()}


def load_cache(directory: Path) -> dict[str, Tensor]:
    """All shards of `directory`, joined."""
    shards = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    if not shards:
        raise FileNotFoundError(f"{directory} has no shards; run `python -m examples.shapes.train --only cache` first")
    return {name: torch.cat([shard.pop(name) for shard in shards]) for name in list(shards[0])}
