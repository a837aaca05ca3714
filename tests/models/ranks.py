"""The end of a program that is one of several processes."""

from __future__ import annotations

import os

import torch.distributed as dist


def end(result: float) -> None:
    """Prints what was found and leaves at once: a thread of torch's backward that still waits for the interpreter while
    that is shutting down aborts the process ("terminate called without an active exception")."""
    dist.destroy_process_group()
    print(result, flush=True)
    os._exit(0)
