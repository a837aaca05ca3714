"""Runs interpreted.py in a process with TRITON_INTERPRET=1, which Triton reads when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inductor_kernels import testing

ROOT = Path(__file__).parents[2]


def test_every_template_runs_and_is_right():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/kernels/interpreted.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_interpreter_says_what_it_needs():
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), testing.interpreter():
        pass
