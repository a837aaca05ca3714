"""Cold compile time of a quantized UNet, whole and by repeated blocks: python -m benchmarks.regional

Each in a process of its own with empty caches, to the end of the first call; W8A8, batch 1. By blocks, the time hardly
grows with depth: each width is compiled once. ``--layout bundled`` is the pipeline in examples/shapes, of 8 transformer
blocks; ``middle`` and ``deep`` are SDXL's layout at toy width, with 15 transformer blocks and all 70. Compile time
depends on the number of operators, not on their size. Writes benchmarks/results/regional.json, one entry per layout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.layouts import SDXL

RESULT = Path(__file__).parent / "results" / "regional.json"
TOY = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (2, 4, 8),
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "norm_num_groups": 8,
}
LAYOUTS: dict[str, dict[str, Any] | None] = {
    "bundled": None,
    "middle": SDXL | TOY | {"layers_per_block": 1, "transformer_layers_per_block": (1, 1, 3)},
    "deep": SDXL | TOY,
}


def subject(layout: str) -> Any:
    """The UNet, W8A8 with text rows and split shortcuts as a real plan has them; ranges do not change the time."""
    from diffusers import UNet2DConditionModel

    from benchmarks.gpu.unet import quantized
    from examples.shapes.subject import load_pipeline

    config = LAYOUTS[layout]
    return quantized(load_pipeline().unet if config is None else UNet2DConditionModel(**config).eval(), 8)


def measure(how: str, layout: str) -> dict[str, float]:
    """Seconds from the first call to its result, and of a second call, in this process."""
    import torch
    from diffusers.models.attention import BasicTransformerBlock

    from benchmarks.gpu.unet import inputs

    torch.manual_seed(0)
    unet = subject(layout)
    call = inputs(unet, 8 * unet.config.sample_size, 1, "cpu", torch.float32)
    seconds = []
    with torch.no_grad():
        eager = unet(**call)[0]
        if how == "whole":
            unet.compile(fullgraph=True)
        else:
            unet.compile_repeated_blocks(fullgraph=True)
        for _ in range(3):
            start = time.perf_counter()
            result = unet(**call)[0]
            seconds.append(time.perf_counter() - start)
    error = ((result - eager).norm() / eager.norm()).item()
    if error > 0.05:
        raise SystemExit(f"{how}: compiled and eager differ by {error:.3f}")
    blocks = sum(isinstance(m, BasicTransformerBlock) for m in unet.modules())
    return {"cold": seconds[0], "warm": min(seconds[1:]), "difference_to_eager": error, "transformer_blocks": blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("how", nargs="?", choices=("blocks", "whole"), help=argparse.SUPPRESS)
    parser.add_argument("--layout", choices=LAYOUTS, default="bundled")
    args = parser.parse_args()
    if args.how:
        print(json.dumps(measure(args.how, args.layout)))
        return
    found: dict[str, Any] = {}
    for how in ("blocks", "whole"):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
            command = [sys.executable, "-m", "benchmarks.regional", how, "--layout", args.layout]
            output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        found[how] = json.loads(output.splitlines()[-1])
        print(how, found[how], flush=True)
    import torch

    found["ratio"] = found["whole"]["cold"] / found["blocks"]["cold"]
    found["machine"] = {"cores": os.cpu_count(), "processor": platform.processor(), "torch": torch.__version__}
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    results[args.layout] = found
    RESULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{args.layout}: cold compile {found['ratio']:.1f} times faster by blocks")


if __name__ == "__main__":
    main()
