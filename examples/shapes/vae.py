"""Trains the AutoencoderKL on drawn pictures."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from examples.shapes.data import draw_spec, picture
from examples.shapes.models import make_vae
from examples.shapes.training import Recipe, Run, fit, generators

RECIPE = Recipe(steps=3000, batch=8, lr=2e-3, average=0.995, seed=1)


def train_vae(
    checkpoint: Path, report: Callable[[int, int, str], None], recipe: Recipe = RECIPE
) -> tuple[AutoencoderKL, dict]:
    """Returns the trained autoencoder and what was measured on held-out pictures (PSNR in dB)."""
    torch.manual_seed(recipe.seed)
    vae = make_vae().to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6  # log variance: latents start with little noise, else nothing but noise is learnt

    def loss(step: int) -> Tensor:
        rng, noise = generators(recipe, step)
        x = torch.stack([picture(draw_spec(rng), rng) for _ in range(recipe.batch)]) * 2 - 1
        return vae_loss(vae, x.contiguous(memory_format=torch.channels_last), noise)

    run = fit(vae, loss, recipe, checkpoint=checkpoint, report=report)
    return vae, _measure(vae, run)


def vae_loss(vae: AutoencoderKL, x: Tensor, noise: torch.Generator) -> Tensor:
    """Values, edges, a trace of Kullback-Leibler, and three latent channels drawn to a small colour picture.

    Without that last term the latents become little more than brightness: good PSNR, but colours that a
    diffusion model confuses. `x` is [B, 3, 64, 64] in [-1, 1].
    """
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample(noise)).sample
    colour = F.mse_loss(posterior.mean[:, :3], 1.3 * F.avg_pool2d(x, 4))
    edges = sum(F.mse_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 0.4 * edges + 0.1 * colour + 1e-4 * kl


@torch.no_grad()
def _measure(vae: AutoencoderKL, run: Run) -> dict:
    rng, _ = generators(run.recipe, -1)
    x = torch.stack([picture(draw_spec(rng, held_out=True), rng) for _ in range(128)]) * 2 - 1
    z = vae.encode(x).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / z.std().item())
    error = ((vae.decode(z).sample.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3))
    psnr = -10 * error.log10()
    return {"psnr_mean": psnr.mean().item(), "psnr_min": psnr.min().item(), "seconds": run.seconds}
