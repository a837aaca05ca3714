"""Seconds until a compiled UNet gives its first picture: python -m benchmarks.compiling tiny|bundled float32|W8A8|W4A8

Run it in its own process with TORCHINDUCTOR_CACHE_DIR set: to an empty folder for a cold start, to the same folder
again for a warm one. Prints JSON.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from mixdq_ao import Plan, calibrate, mixdq_config, quantize_

from .layouts import TINY


def tiny() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY).eval().requires_grad_(False)
    added = {"text_embeds": torch.randn(1, 16), "time_ids": torch.randn(1, 6)}
    inputs = {"sample": torch.randn(1, 4, 16, 16), "timestep": torch.tensor(500), "added_cond_kwargs": added}
    return unet, inputs | {"encoder_hidden_states": torch.randn(1, 77, 32), "return_dict": False}


def bundled_unet() -> tuple[nn.Module, dict[str, Any]]:
    from mixdq_ao.app.latency import unet_inputs
    from mixdq_ao.app.subject import bundled

    shapes = bundled()
    pipe = shapes.load_pipeline()
    return pipe.unet, unet_inputs(pipe, [shapes.prompts(1, seed=3)[0].text])


SUBJECTS = {"tiny": tiny, "bundled": bundled_unet}


@torch.no_grad()
def measure(subject: str, what: str) -> dict[str, float]:
    """Seconds of the first call and of a later one, and the relative difference to the uncompiled output."""
    unet, inputs = SUBJECTS[subject]()
    if what != "float32":
        calibration = replace(calibrate(unet, run=lambda: unet(**inputs)), bos_embedding=None)
        plan = Plan.uniform(unet, int(what[1]), 8).with_calibration(calibration, bos=False)
        unet = copy.deepcopy(unet)
        quantize_(unet, mixdq_config(plan))
    eager = unet(**inputs)[0]
    compiled = torch.compile(unet, fullgraph=True)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        output = compiled(**inputs)[0]
        seconds.append(time.perf_counter() - start)
    error = ((output - eager).norm() / eager.norm()).item()
    return {"first": seconds[0], "later": min(seconds[1:]), "difference_to_eager": error}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:3])))
