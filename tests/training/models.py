"""Parameters, gradients and small models for the optimizers' tests, and comparison bit by bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BF16, FP16 = torch.bfloat16, torch.float16

SPECIAL = [
    *[0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, -1.17549435e-38, 1e-40, -3e-42],  # zeros, subnormal, next to them
    *[1.00390625, -1.00390625, 1.01171875, 0.4980469, -0.4980469],  # ties of bfloat16, next to them
    *[3.3895314e38, 3.3961775e38, 3.4028235e38, -3.4028235e38],  # bfloat16's largest, the step above, float32's
]
"""Values where splitting and rounding have cases of their own."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN like NaN."""
    view = {4: torch.int32, 2: torch.int16}[a.element_size()]
    bits = [torch.where(x.isnan(), torch.nan, x).contiguous().view(view) for x in (a.detach(), b.detach())]
    return a.dtype is b.dtype and torch.equal(bits[0], bits[1])


def wide(shape: Sequence[int], dtype: torch.dtype = BF16) -> Tensor:
    """Gradients over eight powers of ten, with exact zeros and subnormal numbers."""
    x = torch.randn(shape) * 10.0 ** (torch.rand(shape) * 8 - 6)
    kind = torch.rand(shape)
    x = torch.where(kind < 0.05, 0.0, x)
    return torch.where(kind > 0.97, x * 1e-38, x).to(dtype)


def awkward() -> list[nn.Parameter]:
    """float32 parameters: special values, a scalar, one element, odd sizes, channels last, more than one part."""
    torch.manual_seed(0)
    conv = torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)
    values = [torch.tensor(SPECIAL), torch.tensor(0.7), torch.randn(1), torch.randn(37, 41) * 0.02, conv]
    return [nn.Parameter(v) for v in [*values, torch.randn(65536 + 77)]]


def give_gradients(a: Iterable[Tensor], b: Iterable[Tensor], dtype: torch.dtype = BF16) -> None:
    """The same gradients to both; ``b`` gets them in float32."""
    for p, q in zip(a, b, strict=True):
        p.grad = torch.empty_like(p, dtype=dtype).copy_(wide(p.shape)).to(p.dtype)
        q.grad = p.grad.float()


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too, a block used twice, a frozen layer."""

    def __init__(self, width: int = 16, words: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.block = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.checkpoint: bool | None = None  # use_reentrant, or None not to checkpoint

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for _ in range(2):
            x = x + (self.block(x) if self.checkpoint is None else self._again(x))
        return F.linear(self.norm(self.frozen(x)), self.embed.weight)

    def _again(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.block, x, use_reentrant=bool(self.checkpoint))

    def loss(self, words: Tensor) -> Tensor:
        """Of the next word."""
        return F.cross_entropy(self(words[:, :-1]).float().flatten(0, 1), words[:, 1:].flatten())


def tied(dtype: torch.dtype = BF16) -> Tied:
    torch.manual_seed(3)
    return Tied().to(dtype)


def batches(count: int, rows: int = 4) -> list[Tensor]:
    """Words below 8 of 12: some rows of the embedding are never read."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 8, (rows, 9), generator=generator) for _ in range(count)]


class ExactRoots(torch.optim.AdamW):
    """torch's for-loop AdamW, operator by operator, with correctly rounded square roots."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                p.mul_(1 - lr * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = state["exp_avg_sq"].double().sqrt().to(torch.float32)
                denominator = (root / (1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
                p.addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1 ** state["step"]))
