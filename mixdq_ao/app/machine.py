"""What this machine can run: versions, instruction sets, kernels, and what that means in words."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Facts = dict[str, dict[str, Any]]
PACKAGES = ("mixdq-ao", "torch", "torchao", "triton", "diffusers", "transformers", "accelerate", "highspy")


def examine() -> Facts:
    """Versions, the CPU, the kernels used for large products here, and the GPU; None for what is missing."""
    versions = {"python": platform.python_version(), **versions_of(PACKAGES)}
    return {"versions": versions, "cpu": _cpu(), "int8 products": _routes(), "gpu": _gpu()}


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """{package: its version}, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _cpu() -> dict[str, Any]:
    import torch

    from ..compat import CPU_FLAGS, cpu_has

    return {
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "threads used": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: cpu_has(name) for name in CPU_FLAGS},
        "oneDNN": torch.backends.mkldnn.is_available(),
        "C++ compiler": next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None),
    }


def cpu_name() -> str:
    """The processor's name as the system reports it; the machine type if it reports none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _routes() -> dict[str, str]:
    """{weights: the kernel that ``inductor_kernels.routes.route`` chooses for large products}."""
    from inductor_kernels.routes import route

    return {f"{bits}-bit weights": route(bits) for bits in (8, 4, 2)}


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"name": None}
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory
    return {
        "name": torch.cuda.get_device_name(),
        "capability": f"sm_{major}{minor}",
        "memory GiB": round(memory / 2**30, 1),
        "int8 tensor cores": (major, minor) >= (7, 2),
        "rocm": torch.version.hip is not None,
    }


def advice(facts: Facts) -> list[str]:
    """Sentences that say why int8 is or is not faster on the machine, and what is missing."""
    lines = [_cpu_speed(facts), _gpu_speed(facts["gpu"])]
    missing = [n for n in ("torchao", "diffusers", "transformers", "highspy") if facts["versions"][n] is None]
    if missing:
        lines.append(f"Not installed: {', '.join(missing)}; install mixdq-ao with its dependencies.")
    if facts["cpu"]["C++ compiler"] is None:
        lines.append("No C++ compiler was found: torch.compile on a CPU needs one (g++ or clang++).")
    if facts["gpu"]["name"] is not None and facts["versions"]["triton"] is None and sys.platform == "linux":
        lines.append("Triton is not installed: torch.compile on the GPU needs it.")
    return lines


def _cpu_speed(facts: Facts) -> str:
    cpu, routes = facts["cpu"], facts["int8 products"]
    if routes["8-bit weights"] == "onednn-int8":
        unit = "AMX" if cpu["amx"] else "VNNI"
        return f"CPU: int8 is faster than float32 here: oneDNN multiplies 8-bit integers with {unit}."
    if routes["8-bit weights"] == "avx2":
        return (
            "CPU: this processor has neither VNNI nor AMX, so oneDNN's 8-bit products would overflow 16 bits. Layers "
            "with 8-bit weights multiply 16-bit pairs in a kernel built here instead: exact, and faster than float32, "
            "though less than VNNI would be."
        )
    if routes["4-bit weights"] == "onednn-int8":
        return (
            "CPU: this processor has neither VNNI nor AMX, so its 8-bit products would overflow 16 bits. Layers with "
            "4- and 2-bit weights still run as integers, exactly; most with 8-bit weights run in float32 on the "
            "integer codes: right to the last bit and small in memory, but not faster than float32."
        )
    return "CPU: this build of torch has no oneDNN, so quantized layers compute in float32: small, but not faster."


def _gpu_speed(gpu: dict[str, Any]) -> str:
    if gpu["name"] is None:
        return "GPU: none was found; everything runs on the CPU."
    if gpu["int8 tensor cores"]:
        return f"GPU: {gpu['name']} multiplies 8-bit integers on its tensor cores, twice as fast as float16 at best."
    return f"GPU: {gpu['name']} has no int8 tensor cores; plans save memory there, not time."
