"""Compile time of a UNet, cold and with a warm cache, quantized and not: seconds to the end of a first call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

CONTENDERS = ("float32", "W8A8", "W4A8")


def first_call(subject: str, what: str, cache: Path) -> dict[str, float]:
    """Runs ``benchmarks.compiling`` in its own process."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "benchmarks.compiling", subject, what]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("subject", ["tiny", pytest.param("bundled", marks=pytest.mark.slow)])
def test_compile(benchmark: Any, subject: str, tmp_path: Path) -> None:
    """The bundled UNet takes one to two minutes cold on two cores; compiled and uncompiled outputs must agree."""

    def run() -> dict[str, dict[str, float]]:
        found = {}
        for what in CONTENDERS:
            cold, warm = (first_call(subject, what, tmp_path / what) for _ in range(2))
            for state in (cold, warm):  # one level of an 8-bit activation here and there
                assert state["difference_to_eager"] < (1e-4 if what == "float32" else 0.05), (what, state)
            found[what] = {"cold": cold["first"], "warm": warm["first"]}
        return found

    start = time.perf_counter()
    found = benchmark.pedantic(run, rounds=1)
    base = found["float32"]
    benchmark.extra_info.update(seconds=found, total=time.perf_counter() - start)
    print()
    for what, s in found.items():
        ratios = ", ".join(f"{state} {s[state]:.1f} s ({s[state] / base[state]:.2f}x float32)" for state in s)
        print(f"  {what:8} {ratios}")
    assert all(s["warm"] < s["cold"] for s in found.values())
