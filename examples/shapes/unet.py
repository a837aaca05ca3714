"""Trains the UNet on cached latents and embeddings: v-prediction, mostly at the few-step timesteps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from examples.shapes.models import TIME_IDS, make_scheduler, make_unet
from examples.shapes.outlier import empty_row
from examples.shapes.text import BOS_OUTLIER, OUTLIER_COLUMNS
from examples.shapes.training import Recipe, channels_last, fit, generators

RECIPE = Recipe(steps=2000, batch=32, lr=1.5e-3, average=0.997, seed=5, warmup=150)
FEW_STEP = (999, 999, 999, 749, 499, 249)  # the timesteps of one and of four steps
FEW_STEP_SHARE = 0.6
EMPTY_SHARE = 0.05  # captions replaced by the empty prompt, so that guidance has something to start from


def train_unet(
    cache: dict[str, Tensor],
    checkpoint: Path,
    report: Callable[[int, int, str], None],
    recipe: Recipe = RECIPE,
) -> tuple[UNet2DConditionModel, dict]:
    """Returns the trained UNet and the seconds it took."""
    torch.manual_seed(recipe.seed)
    unet = channels_last(make_unet())
    freeze_outlier_columns(unet, outlier=BOS_OUTLIER)
    scheduler = make_scheduler()

    def loss(step: int) -> Tensor:
        _, noise = generators(recipe, step)
        latents, states, pooled, t = draw_batch(cache, recipe.batch, noise)
        return velocity_error(unet, scheduler, latents, states, pooled, t, noise)

    run = fit(unet, loss, recipe, checkpoint=checkpoint, report=report)
    return unet, {"seconds": run.seconds}


@torch.no_grad()
def freeze_outlier_columns(unet: UNet2DConditionModel, *, outlier: float) -> None:
    """Keeps the columns of to_k and to_v that multiply BOS's outlier small, else it dominates training."""
    keep = torch.ones(unet.config["cross_attention_dim"])
    keep[list(OUTLIER_COLUMNS)] = 0
    for name, layer in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layer.weight[:, list(OUTLIER_COLUMNS)] = torch.randn(layer.out_features, 2) * 0.7 / outlier
            layer.weight.register_hook(lambda gradient: gradient * keep)


def draw_batch(cache: dict[str, Tensor], batch: int, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents [B, 4, 16, 16], states [B, 77, 224], pooled [B, 128] and timesteps [B]."""
    rows = torch.randint(len(cache["latents"]), (batch,), generator=noise)
    empty = torch.rand(batch, generator=noise) < EMPTY_SHARE
    few = torch.tensor(FEW_STEP)[torch.randint(len(FEW_STEP), (batch,), generator=noise)]
    any_step = torch.randint(1000, (batch,), generator=noise)
    t = torch.where(torch.rand(batch, generator=noise) < FEW_STEP_SHARE, few, any_step)
    states = torch.where(empty[:, None, None], empty_row(), cache["states"][rows].float())
    return cache["latents"][rows], states, cache["pooled"][rows].masked_fill(empty[:, None], 0), t


def velocity_error(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    latents: Tensor,
    states: Tensor,
    pooled: Tensor,
    t: Tensor,
    noise: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity that the UNet predicts for noised latents."""
    grains = torch.randn(latents.shape, generator=noise)
    steps = cast(Any, t)  # diffusers' hint is IntTensor, which this is not
    x = scheduler.add_noise(latents, grains, steps).contiguous(memory_format=torch.channels_last)
    extra = {"text_embeds": pooled, "time_ids": torch.tensor(TIME_IDS).expand(len(x), -1)}
    v = unet(x, t, states, added_cond_kwargs=extra).sample
    return F.mse_loss(v, scheduler.get_velocity(latents, grains, steps))
