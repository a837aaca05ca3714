"""A recovery of the toy pipeline for the test that kills it: directory, threads, and how it ends.

"at 3": the process kills itself (SIGKILL) in its third save, when the tensors are there and ``run.json`` still names
the old ones. "never": it runs on until somebody else kills it, slowly enough to be met in the middle.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mixdq_ao import Recovery, recover
from mixdq_ao.training import recover_state

from .toy_pipeline import PROMPTS, tiny_pipe, toy_calibration, toy_plan

OPTIONS: dict[str, Any] = {"trajectory": (1, 2), "batch_size": 6, "evaluate_every": 3, "average": 0.8, "lr": 2e-2}
STEPS = 12


def run(directory: Path | None, pipe: Any, **options: Any) -> Recovery:
    """The recovery that every process makes."""
    plan = toy_plan(pipe, toy_calibration(pipe))
    return recover(pipe, plan, PROMPTS, steps=STEPS, checkpoint=directory, save_every=1, **OPTIONS, **options)


def kill_in_save(number: int) -> None:
    """SIGKILL between the tensors and the document of a save."""
    write, count = recover_state.write_document, 0

    def killed(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)

    recover_state.write_document = killed


def main(directory: str, threads: str, end: str) -> None:
    torch.set_num_threads(int(threads))
    if end.startswith("at "):
        kill_in_save(int(end.removeprefix("at ")))
    run(Path(directory), tiny_pipe(), on_evaluation=lambda found: time.sleep(1 if found["step"] else 0))


if __name__ == "__main__":
    main(*sys.argv[1:])
