"""Several processes on gloo give the results of one."""

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
    outputs = run(program, ranks=2)
    assert all(float(output.split()[-1]) <= most for output in outputs)


def test_fsdp2_in_a_group_of_one_process():
    """A group of one process, for which FSDP2 passes only one tensor of each weight."""
    assert run("fsdp_program", "1", ranks=1)


def run(program: str, *arguments: str, ranks: int) -> list[str]:
    """The output of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command, pipe, outputs = [sys.executable, "-m", f"tests.models.{program}"], subprocess.PIPE, []
    started = [[*command, str(rank), port, *arguments] for rank in range(ranks)]
    processes = [subprocess.Popen(c, stdout=pipe, stderr=pipe, text=True) for c in started]
    try:
        for process in processes:
            output, errors = process.communicate(timeout=500)
            assert process.returncode == 0, errors[-2000:]
            outputs.append(output)
    finally:
        for process in processes:
            process.kill()
    return outputs
