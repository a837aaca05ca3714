"""Trains the autoencoder's decoder further, on the latents that the UNet learns to make; the encoder stays."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from examples.shapes.training import Recipe, channels_last, fit, generators
from examples.shapes.vae import decode, draw, edge_loss, encode, psnr

RECIPE = Recipe(steps=1000, batch=8, lr=1e-3, average=0.995, seed=6)
NOISE = 0.04  # largest deviation added to scaled latents (which have deviation 1): the UNet's are not exact either


def train_decoder(
    vae: AutoencoderKL, checkpoint: Path, report: Callable[[int, int, str], None], recipe: Recipe = RECIPE
) -> dict:
    """Trains the decoder of `vae` in place and returns what was measured; absolute errors keep pale contrasts sharp."""
    vae = channels_last(vae.requires_grad_(False))
    parts = [vae.get_submodule(name) for name in ("post_quant_conv", "decoder")]
    decoder = nn.ModuleList(parts).requires_grad_(True)

    def loss(step: int) -> Tensor:
        rng, noise = generators(recipe, step)
        x = draw(rng, recipe.batch)
        with torch.no_grad():
            z = encode(vae, x).mode()
            strength = NOISE / vae.config["scaling_factor"] * torch.rand(len(z), 1, 1, 1, generator=noise)
            z = z + strength * torch.randn(z.shape, generator=noise)
        y = decode(vae, z)
        return 0.5 * F.mse_loss(y, x) + 0.5 * F.l1_loss(y, x) + 0.5 * edge_loss(y, x)

    run = fit(decoder, loss, recipe, checkpoint=checkpoint, report=report)
    return psnr(vae, generators(recipe, -1)[0]) | {"seconds": run.seconds}
