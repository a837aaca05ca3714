"""Memory of a quantized UNet's call by torch and by the kernel: python -m benchmarks.memory_subject W4A8

Random weights in SDXL's layout, narrower and with fewer blocks; in its own process, which starts without the memory of
other models. "W4A8 memory" unpacks weights at every call and keeps nothing (``inductor_kernels.weight_cache``). Prints
JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile

from inductor_kernels import weight_cache
from mixdq_ao import Plan, calibrate, mixdq_config, quantize_

from .held import model_bytes
from .layouts import NARROW_SDXL
from .memory import Peak, anonymous

LATENT = 32
CALLS = 20
"""Several calls, because the kernel's count is sampled every few milliseconds and may miss the peak of one."""
SUBJECT = NARROW_SDXL | {"transformer_layers_per_block": (1, 1, 2)}


def peak_by_torch(call: Any) -> int:
    """Peak bytes allocated by torch's allocator, above those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    now = peak = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def training(unet: UNet2DConditionModel, inputs: dict[str, Any]) -> Any:
    """One training step of an adapter, without an optimizer; the adapter stays in the model."""
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))

    def step() -> None:
        with torch.enable_grad():
            unet(**inputs)[0].square().mean().backward()

    return step


@torch.no_grad()
def measure(what: str) -> dict[str, float]:
    if what.endswith("memory"):
        weight_cache("memory")
    base = anonymous()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SUBJECT).eval().requires_grad_(False)
    added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.randn(1, 6)}
    inputs = {"sample": torch.randn(1, 4, LATENT, LATENT), "timestep": torch.tensor(500), "return_dict": False}
    inputs |= {"encoder_hidden_states": torch.randn(1, 77, 640), "added_cond_kwargs": added}

    def call():
        return unet(**inputs)[0]

    expected = call()
    if what != "float32":
        calibration = replace(calibrate(unet, run=call), bos_embedding=None)
        quantize_(unet, mixdq_config(Plan.uniform(unet, int(what[1]), 8).with_calibration(calibration, bos=False)))
    error = ((call() - expected).norm() / expected.norm()).item()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    settled = anonymous() - base
    with Peak() as peak:
        for _ in range(CALLS):
            call()
    held, by_torch = model_bytes(unet), peak_by_torch(call)
    return {
        "error": error, "held": held, "resident": settled, "call_by_torch": by_torch, "call_by_kernel": peak.bytes,
        "training_by_torch": peak_by_torch(training(unet, inputs)),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
