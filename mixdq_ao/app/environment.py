"""Where figures were measured: machine, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("mixdq-ao", "torch", "torchao", "triton", "diffusers", "transformers", "highspy", "numpy")


def environment() -> dict[str, Any]:
    """Processor, instruction sets, threads, GPU, package versions and the commit, as plain JSON values."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "vnni": _flag("_is_vnni_supported"),
        "amx": _flag("_is_amx_tile_supported"),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _flag(name: str) -> bool | None:
    import torch

    supported = getattr(torch.cpu, name, None)
    return None if supported is None else bool(supported())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or None
