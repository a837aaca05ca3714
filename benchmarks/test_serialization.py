"""Saving and loading a quantized model: seconds, bytes on disk, and memory, against the same model in 16 bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from mixdq_ao import LayerPlan, Plan, load_quantized, mixdq_config, quantize_, save_quantized
from mixdq_ao.layers import find_layers, reads_text
from mixdq_ao.models.flatten import flatten

from .layouts import NARROW_SDXL

MEBI = 2**20
ROUNDS = 5
# Runs in its own process: peak anonymous memory (no file pages) above that of the imports.
MEASURE = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from diffusers import UNet2DConditionModel
from mixdq_ao import load_quantized
from mixdq_ao.models import MixDQConfig

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

what, directory, plan = sys.argv[1:]
done, before, peak = threading.Event(), anonymous(), 0
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
if what == "load_quantized":
    model = load_quantized(directory)
elif what == "from_pretrained":
    model = UNet2DConditionModel.from_pretrained(directory, dtype=torch.float16)
else:
    config = MixDQConfig(plan)
    model = UNet2DConditionModel.from_pretrained(directory, dtype=torch.float16, quantization_config=config)
seconds = time.perf_counter() - start
done.set()
watcher.join()
print(json.dumps({"seconds": seconds, "peak": max(peak, anonymous()) - before}))
"""


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A random UNet in 16 bits on disk; its W8A8 plan with BOS and one range for all; the quantized model."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models")
    model = UNet2DConditionModel(**NARROW_SDXL).eval().half()
    model.save_pretrained(directory / "full")
    layers = {
        n: LayerPlan(weight_bits=8, act_bits=8, act_range=(-4.0, 4.0), bos=reads_text(n)) for n in find_layers(model)
    }
    plan = Plan(layers, bos_embedding=tuple(torch.randn(640).tolist()))
    plan.save(directory / "plan.json")
    weights = sum(p.numel() for p in model.parameters())
    quantize_(model, mixdq_config(plan))
    save_quantized(model, directory / "quantized", plan=plan)
    return SimpleNamespace(directory=directory, model=model, plan=plan, sixteen=2 * weights)


def on_disk(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.iterdir())


def in_own_process(what: str, s: SimpleNamespace) -> dict[str, float]:
    folder = s.directory / ("quantized" if what == "load_quantized" else "full")
    command = [sys.executable, "-c", MEASURE, what, str(folder), str(s.directory / "plan.json")]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_save(benchmark: Any, subject: SimpleNamespace) -> None:
    s = subject
    target = s.directory / "again"
    benchmark.pedantic(lambda: save_quantized(s.model, target, plan=s.plan), rounds=ROUNDS, warmup_rounds=1)
    full = on_disk(s.directory / "full")
    held = sum(t.numel() * t.element_size() for t in flatten(s.model.state_dict()).tensors.values())
    written, seconds = on_disk(target), benchmark.stats.stats.median
    benchmark.extra_info.update(bytes=written, bytes_16_bit=full, tensors=held)
    print(
        f"\nsave: {seconds:.2f} s, {written / MEBI:.1f} MiB ({written / full:.1%} of 16 bits), "
        f"{written / seconds / MEBI:.0f} MiB/s, {written - held} bytes beside the tensors"
    )
    assert written < 1.02 * held


def test_load(benchmark: Any, subject: SimpleNamespace) -> None:
    """In this process, files in the page cache; against diffusers reading 16 bits."""
    s = subject
    benchmark.pedantic(lambda: load_quantized(s.directory / "quantized"), rounds=ROUNDS, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    found = {what: in_own_process(what, s) for what in ("load_quantized", "from_pretrained", "while loading")}
    benchmark.extra_info.update(found)
    print(f"\nload: {seconds:.2f} s warm")
    for what, figures in found.items():
        share = figures["peak"] / s.sixteen
        print(f"{what}: {figures['seconds']:.2f} s, {figures['peak'] / MEBI:.0f} MiB, {share:.1%} of 16 bits")
    assert found["load_quantized"]["peak"] < 0.15 * s.sixteen
    assert found["while loading"]["peak"] < 0.85 * s.sixteen
