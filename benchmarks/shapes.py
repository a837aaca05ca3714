"""The products of SDXL's UNet: shapes and how often each occurs, found by running it on the meta device."""

from __future__ import annotations

from collections import Counter

import torch
from diffusers.models.activations import GEGLU
from torch import nn

from inductor_kernels.roofline import FINISH, FINISH_GATED, Product

from .gpu import unet as subject


@torch.no_grad()
def products(pixels: int, *, tiny: bool = False) -> Counter[Product]:
    """{shape: number of layers} of a call with batch 1; 8-bit weights and 16-bit results."""
    unet = subject.build(dry=tiny, device="meta", dtype=torch.float16)
    found: Counter[Product] = Counter()
    gated = {module.proj for module in unet.modules() if isinstance(module, GEGLU)}

    def seen(layer: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            taps = layer.kernel_size[0] * layer.kernel_size[1]
            found[Product(y.numel() // y.shape[1], y.shape[1], layer.in_channels * taps, taps=taps)] += 1
        else:
            finish = FINISH_GATED if layer in gated else FINISH
            found[Product(y.numel() // y.shape[-1], y.shape[-1], args[0].shape[-1], finish=finish)] += 1

    for layer in unet.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(seen)
    unet(**subject.inputs(unet, pixels, 1, "meta", torch.float16))
    return found
