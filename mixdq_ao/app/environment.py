"""The environment that figures were measured in: machine, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

from .machine import cpu_name, versions_of

PACKAGES = ("mixdq-ao", "torch", "torchao", "triton", "diffusers", "transformers", "highspy", "numpy")


def environment() -> dict[str, Any]:
    """Processor, instruction sets, threads, GPU, package versions and the commit, as plain JSON values."""
    import torch

    from ..compat import cpu_has

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "vnni": cpu_has("vnni"),
        "amx": cpu_has("amx"),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "packages": versions_of(PACKAGES),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The short commit hash; None outside a checkout or without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() or None
