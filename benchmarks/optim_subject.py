"""The comparison of optimizers: a UNet in SDXL's layout, the contenders, and the memory of a step.

Run as a program (python -m benchmarks.optim_subject NAME SIZE) it measures one contender's memory.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixdq_ao import MemoryEfficientAdamW

LR = 1e-3
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": (32, 64), "attention_head_dim": (2, 4), "layers_per_block": 1},
    "small": {"block_out_channels": (64, 128), "attention_head_dim": (2, 4), "layers_per_block": 1},
    "mid": {"block_out_channels": (128, 256), "attention_head_dim": (4, 8), "layers_per_block": 2},
}
"""1.0, 3.9 and 22 million parameters."""


def make_unet(size: str, seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        transformer_layers_per_block=1,
        use_linear_projection=True,
        cross_attention_dim=64,
        **SIZES[size],
    )


def batch_of(seed: int, size: int = 4) -> dict[str, Tensor]:
    """A batch of a learnable denoising task: the noise of a picture made from its text."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(size, 8, 64, generator=g)
    clean = text.mean(1)[:, :4, None, None] * torch.linspace(-3, 3, 16)[:, None] * torch.linspace(-1, 1, 16)
    noise = torch.randn(size, 4, 16, 16, generator=g)
    return {"noisy": 0.6 * clean + 0.8 * noise, "noise": noise, "text": text}


@dataclass
class Contender:
    """A model and its optimizer.

    Attributes:
        model, optimizer: any; the optimizer may be attached.
        dtype: of the model's inputs.
        autocast: run the model under autocast to bfloat16.
    """

    model: UNet2DConditionModel
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype
    autocast: bool = False

    def step(self, batch: dict[str, Tensor]) -> float:
        loss = self.backward(batch)
        self.end()
        return loss

    def backward(self, batch: dict[str, Tensor]) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            noisy, text = (batch[k].to(self.dtype) for k in ("noisy", "text"))
            out = self.model(noisy, torch.tensor(500), text, return_dict=False)[0]
        loss = F.mse_loss(out.float(), batch["noise"])
        loss.backward()
        return loss.item()

    def end(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain(model: UNet2DConditionModel) -> Contender:
    return Contender(model, torch.optim.AdamW(model.parameters(), LR), torch.float32)


def master(model: UNet2DConditionModel) -> Contender:
    return Contender(model, torch.optim.AdamW(model.parameters(), LR), torch.float32, autocast=True)


def stochastic(model: UNet2DConditionModel) -> Contender:
    """torchao's optimizer, uncompiled: it would compile its step for every shape, which takes minutes for a UNet."""
    from torchao.optim import _AdamW

    torch.compiler.set_stance("force_eager")

    model.to(torch.bfloat16)
    return Contender(model, _AdamW(model.parameters(), LR, bf16_stochastic_round=True), torch.bfloat16)


def ours(model: UNet2DConditionModel, *, in_backward: bool = False, moments: str = "float32") -> Contender:
    optimizer = MemoryEfficientAdamW.from_fp32(model, lr=LR, moments=moments)
    if in_backward:
        optimizer.attach(model)
    return Contender(model, optimizer, torch.bfloat16)


CONTENDERS: dict[str, Callable[[UNet2DConditionModel], Contender]] = {
    "torch AdamW, float32": plain,
    "torch AdamW, float32 + autocast": master,
    "torchao, bfloat16 stochastic": stochastic,
    "ours": ours,
    "ours in backward": lambda model: ours(model, in_backward=True),
    "ours in backward, bfloat16 moments": lambda model: ours(model, in_backward=True, moments="bfloat16"),
}


class LiveBytes(TorchDispatchMode):
    """Counts the exact bytes of all live tensors, and their peak.

    Every result of an operator adds its storage until that is freed; temporary memory inside operators is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def add(self, tree: object) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and type(leaf) in (Tensor, torch.nn.Parameter):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._known[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result


def memory_of(name: str, size: str) -> dict[str, float]:
    """In bytes: what is kept between steps, and peaks of one training step after another.

    ``live_peak`` counts tensors; ``resident_peak`` is what is kept and by how much the process grows in the step.
    """
    contender = CONTENDERS[name](make_unet(size))
    contender.step(batch_of(0))
    live, batch = LiveBytes(), batch_of(1)
    states = [v for s in contender.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    live.add([*contender.model.parameters(), *contender.model.buffers(), *states])
    kept = live.now
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    with live:
        contender.backward(batch)
        if "torchao" not in name:  # compiled, as it is meant to be, its step makes no tensors
            contender.end()
    grown = _status("VmHWM") - before
    count = sum(p.numel() for p in contender.model.parameters())
    return {"parameters": count, "kept": kept, "live_peak": live.peak, "resident_peak": kept + grown}


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    print(json.dumps(memory_of(sys.argv[1], sys.argv[2])))
