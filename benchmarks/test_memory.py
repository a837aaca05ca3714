"""Memory of a UNet and of a call: bytes of its tensors, the count of torch's allocator, and the kernel's count."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

NEAR = {"float32": 1e-6, "W8A8": 0.1, "W4A8": 0.5, "W4A8 memory": 0.5}
"""Relative error of the output, of random weights rounded to nearest."""


def test_memory(benchmark: Any) -> None:
    """Each in its own process, which returns freed memory in blocks of 64 KiB."""

    def run() -> dict[str, dict[str, float]]:
        found = {}
        for what in NEAR:
            command = [
                "env", "MALLOC_MMAP_THRESHOLD_=65536", "MALLOC_TRIM_THRESHOLD_=65536",
                sys.executable, "-m", "benchmarks.memory_subject", what,
            ]  # fmt: skip
            done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
            found[what] = json.loads(done.stdout.splitlines()[-1])
        return found

    found = benchmark.pedantic(run, rounds=1)
    base = found["float32"]
    print()
    for what, row in found.items():
        assert row["error"] < NEAR[what], f"{what}: relative error {row['error']:.3f}"
        cells = [f"{key} {row[key] / 2**20:7.1f} MiB ({row[key] / base[key]:.2f})" for key in row if key != "error"]
        print(f"  {what:12} " + ", ".join(cells))
    benchmark.extra_info.update(found)
    for row in found.values():  # what torch hands out is resident once written to
        assert row["call_by_torch"] <= 1.1 * row["call_by_kernel"]
    kept = found["W4A8 memory"]
    assert kept["held"] < 0.16 * base["held"] and kept["resident"] < 0.25 * base["resident"]
