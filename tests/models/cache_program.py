"""Compiles a small quantized block and says, as JSON, how long the first call took and what the caches did.

    python -m tests.models.cache_program [save FILE | load FILE]

The caches are where TORCHINDUCTOR_CACHE_DIR says; FILE holds what ``torch.compiler.save_cache_artifacts`` gives.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.utils import counters

from mixdq_ao import LayerPlan, Plan, mixdq_config, quantize_

WIDTH, OUTLIER = 16, 300.0


class Block(nn.Module):
    """A convolution, text projections with a BOS row, weights of 8, 4 and 2 bits, one with 16-bit activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, WIDTH, 3, padding=1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.conv(x)).flatten(2).transpose(1, 2)
        scores = self.to_q(y) @ self.to_k(text).transpose(1, 2)
        return y + self.out(scores.softmax(-1) @ self.to_v(text))


def quantized() -> Block:
    torch.manual_seed(0)
    block = Block().eval().requires_grad_(False)
    ranged = LayerPlan(weight_bits=8, act_bits=8, act_range=(-4.0, 4.0))
    text = LayerPlan(weight_bits=4, act_bits=8, act_range=(-4.0, 4.0), bos=True)
    layers = {"conv": ranged, "to_q": ranged, "to_k": text, "to_v": text, "out": LayerPlan(weight_bits=2, act_bits=16)}
    embedding = tuple([OUTLIER, *[0.5] * (WIDTH - 1)])
    quantize_(block, mixdq_config(Plan(layers, {}, embedding)))
    return block


def main() -> None:
    what, place = (sys.argv[1], Path(sys.argv[2])) if len(sys.argv) == 3 else ("", Path())
    block = quantized()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, WIDTH)
    text[:, 0] = 0.5
    text[:, 0, 0] = OUTLIER
    expected = block(x, text)
    if what == "load":
        assert torch.compiler.load_cache_artifacts(place.read_bytes()) is not None
    compiled = torch.compile(block, fullgraph=True)
    start = time.perf_counter()
    result = compiled(x, text)
    seconds = time.perf_counter() - start
    if what == "save":
        saved = torch.compiler.save_cache_artifacts()
        assert saved is not None
        place.write_bytes(saved[0])
    found = {**counters["inductor"], **counters["aot_autograd"]}
    counted = {n: v for n, v in found.items() if "cache" in n and isinstance(v, int)}
    error = (result - expected).abs().max().item()
    print(json.dumps({"seconds": seconds, "difference_to_eager": error, "counters": counted}))


if __name__ == "__main__":
    main()
