"""Bytes of tensors alive, counted as torch allocates them; tracemalloc does not see them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def mapped_ranges() -> list[tuple[int, int]]:
    """Addresses of safetensors files mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if ".safetensors" in line]
    return [(int(a, 16), int(b, 16)) for a, b in spans]


def unmapped(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that are not views of such files."""
    spans = mapped_ranges()
    return [t for t in tensors if not any(low <= t.data_ptr() < high for low, high in spans)]


def plain(tensor: Tensor) -> list[Tensor]:
    """The plain tensors of a tensor, or inside a (nested) subclass."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [t for name in names for t in plain(getattr(tensor, name))]


def peak_allocated(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function returns, and the most bytes that torch held at once while it ran, beyond those it held before.

    Counted are torch's allocations on the CPU as the profiler records them, and mapped files with their size.
    """
    gc.collect()  # what others left, freed meanwhile, would be taken off
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return result, max(accumulate((size for _, size in changes), initial=0))


def model_bytes(model: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for value in model.state_dict().values() for t in plain(value))
