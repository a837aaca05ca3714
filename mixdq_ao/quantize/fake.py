"""Fake mode: the rounding of real mode in floating point, differentiable through a straight-through estimator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bos import bos_mask
from .quantizer import ActQuant, fake_quantize_act, quantize_weight
from .tensor import bos_row


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Value of ``rounded``, gradient of ``x`` (Bengio et al. 2013, arXiv 1308.3432)."""
    return x + (rounded - x).detach()


class FakeQuantizer(nn.Module):
    """How one layer rounds its weight and input; no parameters of its own.

    Attributes:
        weight_bits, symmetric: as in LayerPlan; 16 leaves the weight alone.
        acts: activation parameters of each half of the input (one entry without a split; empty: 16 bit).
        split: channels of the first half, or None.
    """

    bos_embedding: Tensor | None

    def __init__(
        self,
        weight_bits: int,
        symmetric: bool,
        acts: tuple[ActQuant, ...],
        split: int | None,
        bos_embedding: Tensor | None,
    ) -> None:
        super().__init__()
        self.weight_bits, self.symmetric, self.acts, self.split = weight_bits, symmetric, acts, split
        self.register_buffer("bos_embedding", bos_embedding, persistent=False)

    def weight(self, weight: Tensor) -> Tensor:
        if self.weight_bits == 16:
            return weight
        halves = [weight] if self.split is None else weight.tensor_split([self.split], 1)
        rounded = [quantize_weight(h, self.weight_bits, symmetric=self.symmetric).dequantize() for h in halves]
        return straight_through(weight, torch.cat(rounded, 1).to(weight.dtype))

    def input(self, x: Tensor) -> Tensor:
        """The input rounded; x is [..., K], or [(B,) C, H, W] where the layer has a split."""
        if not self.acts:
            return x
        if self.split is None:
            return straight_through(x, fake_quantize_act(x, self.acts[0]))
        halves = x.tensor_split([self.split], x.dim() - 3)
        rounded = [fake_quantize_act(h, act) for h, act in zip(halves, self.acts, strict=True)]
        return straight_through(x, torch.cat(rounded, x.dim() - 3))

    def extra_repr(self) -> str:
        acts = {0: 16}.get(len(self.acts)) or {15: 4, 255: 8}[self.acts[0].levels]
        return f"W{self.weight_bits}A{acts}" + ("" if self.split is None else f", split={self.split}")


class FakeQuantLinear(nn.Linear):
    """A linear layer whose weight stays a trainable floating-point parameter and is rounded at every call."""

    quantizer: FakeQuantizer

    def forward(self, input: Tensor) -> Tensor:
        q = self.quantizer
        y = F.linear(q.input(input), q.weight(self.weight), self.bias)
        if q.bos_embedding is None:
            return y
        row = bos_row(self.weight, q.bos_embedding)
        row = row if self.bias is None else row + self.bias
        return torch.where(bos_mask(input, q.bos_embedding), row.to(y.dtype), y)


class FakeQuantConv2d(nn.Conv2d):
    """A convolution whose weight stays a trainable floating-point parameter and is rounded at every call."""

    quantizer: FakeQuantizer

    def forward(self, input: Tensor) -> Tensor:
        q = self.quantizer
        return self._conv_forward(q.input(input), q.weight(self.weight), self.bias)


def with_fake_quantizer(module: nn.Linear | nn.Conv2d, quantizer: FakeQuantizer) -> nn.Linear | nn.Conv2d:
    """``module`` as its fake-quantized class; parameters, hooks and names stay the same objects."""
    _become(module, FakeQuantLinear if isinstance(module, nn.Linear) else FakeQuantConv2d)
    module.quantizer = quantizer.to(module.weight.device)
    return module


def without_fake_quantizer(module: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The plain layer again, with the parameters as they are now."""
    if isinstance(module, FakeQuantLinear | FakeQuantConv2d):
        del module.quantizer
        _become(module, nn.Linear if isinstance(module, FakeQuantLinear) else nn.Conv2d)
    return module


def _become(module: Any, kind: type[nn.Module]) -> None:
    module.__class__ = kind
