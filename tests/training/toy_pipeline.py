"""A pipeline of seconds: a denoiser of 15 layers or the small UNet, texts made rows by their letters, a sampler."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixdq_ao import Calibration, LayerPlan, Plan, calibrate

from ..conftest import OUTLIER, bos_row

PROMPTS = [f"a {size} {colour} circle" for size in ("small", "large", "huge") for colour in ("red", "green", "blue")]


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(24, width, bias=False), nn.Linear(24, width)
        with torch.no_grad():
            for layer in (self.to_k, self.to_v):
                layer.weight[:, OUTLIER] *= 0.01

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.to_out(F.scaled_dot_product_attention(self.to_q(x), self.to_k(text), self.to_v(text)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, width), nn.Conv2d(width, width, 3, padding=1)
        self.attn2 = Attention(width)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = x + self.conv(F.silu(self.norm(x)) + time[:, :, None, None])
        return x + self.attn2(x.flatten(2).mT, text).mT.view(x.shape)


class TinyDenoiser(nn.Module):
    """Convolutions, cross attention with BOS rows, a condition in a nested dict: called as diffusers calls a UNet."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.time, self.pooled = nn.Linear(8, width), nn.Linear(12, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        phase = timestep.expand(len(sample)).float()[:, None] / 1000 * torch.arange(1, 9)
        time = F.silu(self.time(phase.sin().to(sample.dtype)) + self.pooled(added_cond_kwargs["text_embeds"]))
        x = self.conv_in(sample)
        for block in self.blocks:
            x = block(x, time, encoder_hidden_states)
        return (self.conv_out(F.silu(x)),)


class ToyPipe:
    """What ``recover`` uses of a diffusers pipeline."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.drawn = 0

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        num_inference_steps: int,
        guidance_scale: float,
        generator: list[torch.Generator],
        output_type: str,
    ) -> Any:
        self.drawn += len(prompt)
        dtype = next(self.unet.parameters()).dtype
        rows, pooled = (torch.stack(t).to(dtype) for t in zip(*(_read(text) for text in prompt), strict=True))
        x = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generator]).to(dtype)
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]], dtype=dtype).expand(len(x), -1)
        for i in range(num_inference_steps):
            t = torch.tensor(999 - 999 * i // num_inference_steps)
            extra = {"text_embeds": pooled, "time_ids": ids}
            (y,) = self.unet(x, t, encoder_hidden_states=rows, added_cond_kwargs=extra, return_dict=False)
            x = x - y / num_inference_steps
        return SimpleNamespace(images=x)


def _read(text: str) -> tuple[Tensor, Tensor]:
    """States [7, 24] with the BOS row first, pooled [12]."""
    letters = torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(text)))
    rows = torch.randn(7, 24, generator=letters)
    rows[0] = bos_row()
    return rows, torch.randn(12, generator=letters)


def tiny_pipe() -> ToyPipe:
    """A new pipeline; the same weights every time."""
    torch.manual_seed(5)
    return ToyPipe(TinyDenoiser().eval())


def again(pipe: ToyPipe) -> ToyPipe:
    """Another pipeline of the same weights."""
    return ToyPipe(copy.deepcopy(pipe.unet))


def toy_calibration(pipe: ToyPipe) -> Calibration:
    return calibrate(pipe, PROMPTS, steps=(1, 2))


def toy_plan(pipe: ToyPipe, calibration: Calibration, bits: int = 2, **fields: Any) -> Plan:
    """Uniform, but the last layer at 16 bits and ``conv_in`` at 8."""
    plan = Plan.uniform(pipe.unet, bits, 8)
    layers = {n: LayerPlan(weight_bits=bits, act_bits=8, **fields) for n in plan.layers}
    layers |= {"conv_out": LayerPlan(), "conv_in": LayerPlan(weight_bits=8, act_bits=8)}
    return plan.with_layers(layers).with_calibration(calibration)
