"""Two processes on gloo give what one gives."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "program, most", [("fsdp_program", 0.0), ("dtensor_program", 1e-6), ("parallel_program", 0.02)]
)
def test_two_processes_are_one(program, most):
    """FSDP2 to the bit, DTensor but for the order of a sum. In the UNet a code may differ by one after such a sum."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", f"tests.models.{program}"]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen([*command, str(r), port], stdout=pipe, stderr=pipe, text=True) for r in range(2)]
    try:
        for process in processes:
            output, errors = process.communicate(timeout=500)
            assert process.returncode == 0, errors[-2000:]
            assert float(output.split()[-1]) <= most
    finally:
        for process in processes:
            process.kill()
