"""Training steps side by side: memory, time and final loss of the optimizers on a UNet.

MIXDQ_OPTIM_SIZE=tiny|small|mid chooses the UNet (default small). Memory is measured in a process for each contender;
steps are timed in one process, one of each contender in turn. With MIXDQ_OPTIM_OUT=directory the figures go into
optim.json and optim.md there.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mixdq_ao import MemoryEfficientAdamW
from mixdq_ao.app.environment import environment
from mixdq_ao.jsonfile import write_document

from . import record
from .optim_subject import CONTENDERS, batch_of, make_unet

SIZE = os.environ.get("MIXDQ_OPTIM_SIZE", "small")
OUT = os.environ.get("MIXDQ_OPTIM_OUT")
ROUNDS, SEEDS, LOSS_STEPS = 4, 3, 60
TIMED, LOSSES = 1, 2
"""Batches: the smallest in time, where the optimizer weighs most."""
MASTER = "torch AdamW, float32 + autocast"


def show(key: str, title: str, rows: dict[str, str], figures: dict[str, Any]) -> None:
    """Prints a table, and stores it if MIXDQ_OPTIM_OUT is set."""
    print(f"\n{title}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, row in rows.items():
        print(f"  {name:36} {row}")
    if OUT:
        path = Path(OUT) / "optim.json"
        document = json.loads(path.read_text()) if path.exists() else {}
        set_by = f"MIXDQ_OPTIM_SIZE={SIZE} MIXDQ_OPTIM_OUT={OUT} "
        command = set_by + record.command("pytest")
        document[key] = {"title": title, "rows": rows, "figures": figures, "command": command}
        document[key] |= {"threads": torch.get_num_threads(), "environment": environment()}
        write_document(path, document)
        path.with_suffix(".md").write_text("\n".join([account(document), *map(markdown, document.values())]))


def account(document: dict[str, Any]) -> str:
    """The results of the existing tables in words."""
    lines = []
    if "memory" in document:
        f = document["memory"]["figures"]
        less = {name: 1 - f[name]["live_peak"] / f[MASTER]["live_peak"] for name in f}
        lines.append(
            f"Peak memory against {MASTER}: {less['ours in backward']:.0%} lower inside backward with float32 moments, "
            f"{less['ours in backward, bfloat16 moments']:.0%} with bfloat16 moments."
        )
    if "step_time" in document:
        f = document["step_time"]["figures"]
        medians = {name: statistics.median(t[1:]) for name, t in f["seconds"].items()}
        own = statistics.median(f["of them step()"]["ours"][1:])
        lines.append(
            f"Time of a step: {medians['ours'] / medians[MASTER]:.2f} of it, "
            f"{medians['ours in backward'] / medians[MASTER]:.2f} inside backward. The optimizer's part of that is "
            f"{own / medians['ours']:.0%}; the rest is the model's own passes, which both run in bfloat16. A processor "
            "without bfloat16 arithmetic emulates it: the whole step in float32 takes "
            f"{medians['torch AdamW, float32'] / medians[MASTER]:.2f} of the time. No gain in time can be shown there."
        )
    return "\n".join([*lines, ""])


def markdown(part: dict[str, Any]) -> str:
    e = part["environment"]
    versions = f"torch {e['packages']['torch']}, torchao {e['packages']['torchao']}"
    where = f"{e['processor']}, {e['cpu_capability']}, {part['threads']} threads, {versions}, commit {e['commit']}"
    lines = [f"**{part['title']}**", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {row} |" for name, row in part["rows"].items()]
    return "\n".join([*lines, "", f"{where}; `{part['command']}`", ""])


def test_memory(benchmark: Any) -> None:
    """Peaks in MiB; freed memory goes back at once (large blocks are mapped), so resident peaks mean something."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

    def measure() -> dict[str, dict[str, float]]:
        found = {}
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.optim_subject", name, SIZE]
            done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            found[name] = json.loads(done.stdout.splitlines()[-1])
        return found

    found = benchmark.pedantic(measure, rounds=1)
    base = found[MASTER]
    show(
        "memory",
        f"peak memory of a step in MiB (of {MASTER}), {SIZE} UNet",
        {
            name: f"{f['kept'] / f['parameters']:5.2f} B/parameter kept, live {f['live_peak'] / 2**20:6.1f} "
            f"({f['live_peak'] / base['live_peak']:.2f}), resident {f['resident_peak'] / 2**20:6.1f} "
            f"({f['resident_peak'] / base['resident_peak']:.2f})"
            for name, f in found.items()
        },
        found,
    )
    benchmark.extra_info.update(found, size=SIZE)
    assert max(f["live_peak"] for name, f in found.items() if name.startswith("ours")) < base["live_peak"]
    if SIZE == "mid":  # the gradients that are freed early count for little beside a smaller model's activations
        assert found["ours in backward"]["live_peak"] < found["ours"]["live_peak"]


def test_step_time(benchmark: Any) -> None:
    """Whole training steps (forward, backward, optimizer); the machine's bfloat16 decides most of it.

    Also the time of the optimizer's step alone, which is nothing if it runs inside backward.
    """
    contenders = {name: make(make_unet(SIZE)) for name, make in CONTENDERS.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    ends: dict[str, list[float]] = {name: [] for name in contenders}
    seed = 0

    def one_round() -> None:
        nonlocal seed
        seed += 1
        for name, contender in contenders.items():
            batch = batch_of(seed, TIMED)
            start = time.perf_counter()
            contender.backward(batch)
            between = time.perf_counter()
            contender.end()
            ends[name].append(time.perf_counter() - between)
            times[name].append(time.perf_counter() - start)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}
    show(
        "step_time",
        f"training step of {TIMED} sample (of {MASTER}), {SIZE} UNet",
        {
            name: f"median {m * 1e3:7.1f} ms ({m / medians[MASTER]:.2f}), least {min(times[name]) * 1e3:7.1f} ms, "
            f"step() {statistics.median(ends[name][1:]) * 1e3:5.1f} ms"
            for name, m in medians.items()
        },
        {"seconds": times, "of them step()": ends, "batch": TIMED},
    )
    benchmark.extra_info.update(seconds=medians, size=SIZE)


def test_update_time(benchmark: Any) -> None:
    """The optimizer's step alone, on one tensor of a million values, in nanoseconds a value."""
    from torchao.optim import _AdamW

    n = 1 << 20

    def ready(make: Any, dtype: torch.dtype) -> torch.optim.Optimizer:
        p = torch.nn.Parameter(torch.randn(n).to(dtype))
        p.grad = torch.randn(n).to(dtype)
        return make([p])

    optimizers = {
        "torch AdamW, float32": ready(lambda p: torch.optim.AdamW(p, foreach=False), torch.float32),
        "torch AdamW fused, float32": ready(lambda p: torch.optim.AdamW(p, fused=True), torch.float32),
        "ours": ready(MemoryEfficientAdamW, torch.bfloat16),
        "ours, nothing checked": ready(lambda p: MemoryEfficientAdamW(p, nonfinite="propagate"), torch.bfloat16),
        "ours, bfloat16 moments": ready(lambda p: MemoryEfficientAdamW(p, moments="bfloat16"), torch.bfloat16),
        "ours, 8-bit moments": ready(lambda p: MemoryEfficientAdamW(p, moments="8bit"), torch.bfloat16),
        "torchao, bfloat16 stochastic, compiled": ready(
            lambda p: _AdamW(p, bf16_stochastic_round=True), torch.bfloat16
        ),
        "ours, compiled": ready(lambda p: MemoryEfficientAdamW(p, compile=True), torch.bfloat16),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}

    def one_round() -> None:
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - start)

    torch.compiler.set_stance("default")
    benchmark.pedantic(one_round, rounds=20, warmup_rounds=2)
    least = {name: min(t[2:]) / n * 1e9 for name, t in times.items()}
    show(
        "update",
        "step() of one tensor of a million values",
        {name: f"{v:6.2f} ns/value" for name, v in least.items()},
        {"nanoseconds a value": least},
    )
    benchmark.extra_info.update(nanoseconds=least)


@pytest.mark.parametrize("size", ["tiny"])
def test_final_loss(benchmark: Any, size: str) -> None:
    """Mean loss of the last ten steps over three seeds: equal within the spread of the seeds."""

    def train() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for seed in range(SEEDS):
            for name, make in CONTENDERS.items():
                if name == "ours in backward":
                    continue  # the same bits as after it, see tests/training
                contender = make(make_unet(size, seed))
                losses = [contender.step(batch_of(1000 * seed + step, LOSSES)) for step in range(LOSS_STEPS)]
                found[name].append(statistics.mean(losses[-10:]))
        torch.compiler.set_stance("default")
        return {name: v for name, v in found.items() if v}

    found = benchmark.pedantic(train, rounds=1)
    rows = {n: " ".join(f"{x:.4f}" for x in v) + f"  mean {statistics.mean(v):.4f}" for n, v in found.items()}
    show("loss", f"loss after {LOSS_STEPS} steps, {SEEDS} seeds, {size} UNet", rows, {"losses": found, "batch": LOSSES})
    benchmark.extra_info.update(losses=found)
    spread = statistics.stdev(found["torch AdamW, float32"])
    for values in found.values():
        differences = [a - b for a, b in zip(values, found["torch AdamW, float32"], strict=True)]
        assert abs(statistics.mean(differences)) < 2 * spread + 0.01
