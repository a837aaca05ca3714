"""Trains the AutoencoderKL on drawn pictures."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from examples.shapes.data import draw_spec, picture
from examples.shapes.models import make_vae
from examples.shapes.training import Recipe, channels_last, fit, generators

RECIPE = Recipe(steps=3000, batch=8, lr=2e-3, average=0.995, seed=1)


def train_vae(
    checkpoint: Path, report: Callable[[int, int, str], None], recipe: Recipe = RECIPE
) -> tuple[AutoencoderKL, dict]:
    """Returns the trained autoencoder and measurements on held-out pictures (PSNR in dB)."""
    torch.manual_seed(recipe.seed)
    vae = channels_last(make_vae())
    with torch.no_grad():
        # log variance: latents start with little noise, else only noise is learnt
        vae.get_parameter("quant_conv.bias")[4:] = -6

    def loss(step: int) -> Tensor:
        rng, noise = generators(recipe, step)
        return vae_loss(vae, draw(rng, recipe.batch), noise)

    run = fit(vae, loss, recipe, checkpoint=checkpoint, report=report)
    held_out = generators(recipe, -1)[0]
    with torch.no_grad():
        z = encode(vae, draw(held_out, 128, held_out=True)).mode()
    vae.register_to_config(scaling_factor=1 / z.std().item())
    return vae, psnr(vae, held_out) | {"seconds": run.seconds}


def draw(rng: random.Random, n: int, *, held_out: bool = False) -> Tensor:
    """Pictures [n, 3, 64, 64] in [-1, 1], channels last."""
    x = torch.stack([picture(draw_spec(rng, held_out=held_out), rng) for _ in range(n)]) * 2 - 1
    return x.contiguous(memory_format=torch.channels_last)


def encode(vae: AutoencoderKL, x: Tensor) -> DiagonalGaussianDistribution:
    """The distribution of the latents [B, 4, H / 4, W / 4] of `x` [B, 3, H, W]."""
    return cast(Any, vae.encode)(x).latent_dist  # diffusers' hints allow for a tuple alone


def decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """The pictures [B, 3, H, W] of latents [B, 4, H / 4, W / 4]."""
    return cast(Any, vae.decode)(z).sample


def vae_loss(vae: AutoencoderKL, x: Tensor, noise: torch.Generator) -> Tensor:
    """Values, edges, a little Kullback-Leibler, and three latent channels pulled towards a small colour picture.

    Without that last term the latents become little more than brightness: good PSNR, but colours that a
    diffusion model confuses. `x` is [B, 3, 64, 64] in [-1, 1].
    """
    posterior = encode(vae, x)
    y = decode(vae, posterior.sample(noise))
    colour = F.mse_loss(posterior.mean[:, :3], 1.3 * F.avg_pool2d(x, 4))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 0.4 * edge_loss(y, x) + 0.1 * colour + 1e-4 * kl


def edge_loss(y: Tensor, x: Tensor) -> Tensor:
    """Mean squared error of the differences between neighbouring pixels, rows plus columns."""
    return F.mse_loss(y.diff(dim=2), x.diff(dim=2)) + F.mse_loss(y.diff(dim=3), x.diff(dim=3))


@torch.no_grad()
def psnr(vae: AutoencoderKL, rng: random.Random) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB over 128 held-out pictures."""
    x = draw(rng, 128, held_out=True)
    y = decode(vae, encode(vae, x).mode()).clamp(-1, 1)
    decibels = -10 * ((y - x) / 2).square().mean((1, 2, 3)).log10()
    return {"psnr_mean": decibels.mean().item(), "psnr_min": decibels.min().item()}
