"""kill -9 of a recovery, in the worst place and from outside: started again, it ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from mixdq_ao.models.flatten import flatten

from .kill_program import run
from .toy_pipeline import ToyPipe, tiny_pipe

ROOT = Path(__file__).parents[2]
SECONDS = 600


def start(directory: Path, end: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.training.kill_program", str(directory), str(torch.get_num_threads()), end]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)


def steps_done(directory: Path) -> int:
    return json.loads((directory / "run.json").read_text())["progress"]["step"]


def tensors(pipe: ToyPipe) -> dict[str, torch.Tensor]:
    return flatten(dict(pipe.unet.named_parameters())).tensors


def test_killed_twice_and_the_same_to_the_bit(tmp_path):
    place = tmp_path / "run"
    whole, parts = tiny_pipe(), tiny_pipe()
    first = start(place, "at 3")
    try:
        expected = run(None, whole)
        _, err = first.communicate(timeout=SECONDS)
    finally:
        first.kill()
    assert first.returncode == -signal.SIGKILL, err.decode()
    assert steps_done(place) == 2 and (place / "state-3.safetensors").exists()

    second = start(place, "never")
    try:
        deadline = time.monotonic() + SECONDS
        while steps_done(place) < 3 and second.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        second.kill()
        _, err = second.communicate()
    assert second.returncode == -signal.SIGKILL, err.decode()
    assert 3 <= steps_done(place) < 12

    found = run(place, parts)
    assert found.history == expected.history and found.real == expected.real
    a, b = tensors(whole), tensors(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(p.name for p in place.iterdir()) == ["run.json", "state-12.safetensors"]
