"""FSDP2 on two processes of this machine (gloo): what they check is in ``fsdp_program.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
SECONDS = 300


def gloo_works(path: Path) -> str:
    """Empty where a group of one process starts; else why it does not."""
    if not dist.is_available() or not dist.is_gloo_available():
        return "this torch has no gloo"
    try:
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    except (RuntimeError, ValueError) as e:
        return f"gloo cannot start here: {e}"
    dist.destroy_process_group()
    return ""


def test_two_processes(tmp_path):
    if reason := gloo_works(tmp_path / "one"):
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.training.fsdp_program"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(tmp_path / "saved")],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=SECONDS)[0] for p in running]
    finally:
        for p in running:
            p.kill()
    ends = zip(range(2), running, outputs, strict=True)
    failed = [
        f"--- process {rank} ended with {process.returncode} ---\n{out}"
        for rank, process, out in ends
        if process.returncode
    ]
    assert not failed, "\n".join(failed)
