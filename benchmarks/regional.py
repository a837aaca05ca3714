"""Cold compile time of the bundled UNet, whole and by repeated blocks: python -m benchmarks.regional

Each in a process of its own with empty caches, to the end of the first call; W8A8, batch 1. Writes
benchmarks/results/regional.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "regional.json"


def measure(how: str) -> dict[str, float]:
    """Seconds from the first call to its result, and of a second call, in this process."""
    from examples.shapes import subject
    from mixdq_ao import Plan, Sampling, calibrate, mixdq_config, quantize_
    from mixdq_ao.models.pipelines import generate_all

    pipe = subject.load_pipeline()
    texts = [p.text for p in subject.prompts(1, seed=3)]
    plan = Plan.uniform(pipe.unet, 8, 8).with_calibration(calibrate(pipe, texts))
    quantize_(pipe.unet, mixdq_config(plan))
    sampling = Sampling(batch_size=1)
    eager = generate_all(pipe, texts, sampling, "latent")
    if how == "whole":
        pipe.unet.compile(fullgraph=True)
    else:
        pipe.unet.compile_repeated_blocks(fullgraph=True)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        latents = generate_all(pipe, texts, sampling, "latent")
        seconds.append(time.perf_counter() - start)
    error = ((latents - eager).norm() / eager.norm()).item()
    if error > 0.05:
        raise SystemExit(f"{how}: compiled and eager differ by {error:.3f}")
    return {"cold": seconds[0], "warm": min(seconds[1:]), "difference_to_eager": error}


def main() -> None:
    found = {}
    for how in ("blocks", "whole"):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
            command = [sys.executable, "-m", "benchmarks.regional", how]
            output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        found[how] = json.loads(output.splitlines()[-1])
        print(how, found[how], flush=True)
    import torch

    found["ratio"] = found["whole"]["cold"] / found["blocks"]["cold"]
    found["machine"] = {"cores": os.cpu_count(), "processor": platform.processor(), "torch": torch.__version__}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"cold compile {found['ratio']:.1f} times faster by blocks")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
