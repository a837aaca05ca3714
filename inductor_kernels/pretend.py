"""Stand-ins that let Inductor and Triton generate code for a GPU that is not there."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton.runtime
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from .tiles import SHARED_BYTES, SMS, family


class Driver(DriverBase):
    """Answers what Triton asks its driver before it compiles."""

    def __init__(self, capability: int, device: str) -> None:
        self._target, self._device = GPUTarget("cuda", capability, 32), torch.device(device)
        shared = SHARED_BYTES[family(capability)]
        properties = dict(max_shared_mem=shared, max_num_regs=65536, multiprocessor_count=SMS[family(capability)])
        properties.update(warpSize=32, sm_clock_rate=1, mem_clock_rate=1, mem_bus_width=1)
        self.utils = types.SimpleNamespace(get_device_properties=lambda index: properties)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return self._device

    def get_device_interface(self) -> Any:
        return torch.cuda

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Callable[..., Any]:
        from triton.testing import do_bench

        return do_bench


@contextlib.contextmanager
def driver(capability: int, device: str) -> Iterator[None]:
    """Make :class:`Driver` Triton's active driver."""
    config = triton.runtime.driver
    before = getattr(config, "_active", None)
    config.set_active(Driver(capability, device))
    try:
        yield
    finally:
        config._active = before


def _properties(capability: int) -> types.SimpleNamespace:
    listed = family(capability)
    return types.SimpleNamespace(
        name=f"pretended sm_{capability}", major=capability // 10, minor=capability % 10, total_memory=80 << 30,
        multi_processor_count=SMS[listed], regs_per_multiprocessor=65536, warp_size=32,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, shared_memory_per_block=49152,
        shared_memory_per_block_optin=SHARED_BYTES[listed], shared_memory_per_multiprocessor=SHARED_BYTES[listed],
        L2_cache_size=50 << 20, gcnArchName="", is_integrated=False,
    )  # fmt: skip


def _answers(capability: int) -> dict[str, Callable[..., object]]:
    """Replacements for functions of ``torch.cuda`` and of Inductor's interface to it, by name."""
    properties = _properties(capability)
    pair = (capability // 10, capability % 10)
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: pair,
        "get_compute_capability": lambda device=None: capability,
        "is_bf16_supported": lambda *a, **k: True,
        "is_tf32_supported": lambda *a, **k: True,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "get_raw_stream": lambda device=None: 0,
        "_lazy_init": lambda: None,
    }


@contextlib.contextmanager
def _forgetting() -> Iterator[None]:
    """Clear torch's cached answers whether Triton works, on entry and on exit."""
    import torch.utils._triton as answers

    caches = [f for f in vars(answers).values() if hasattr(f, "cache_clear")]
    try:
        for cache in caches:
            cache.cache_clear()
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


@contextlib.contextmanager
def cuda(capability: int) -> Iterator[None]:
    """Make torch believe that it has one GPU. Only fake tensors can live there."""
    import torch._inductor.fx_passes.fuse_attention as attention
    import torch._inductor.fx_passes.misc_patterns as misc
    import torch._inductor.fx_passes.pad_mm as pad
    import torch._subclasses.fake_tensor as fake
    from torch._dynamo.device_interface import CudaInterface

    with contextlib.ExitStack() as stack:
        stack.enter_context(_forgetting())
        stack.enter_context(driver(capability, "cuda"))
        for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
            for name, answer in _answers(capability).items():
                if hasattr(owner, name):
                    value = answer if owner is torch.cuda else staticmethod(answer)
                    stack.enter_context(mock.patch.object(owner, name, value))
        for owner, name in (
            # the first three trace patterns with real CUDA tensors, the last one initializes the runtime
            (attention, "_sfdp_init"),
            (pad, "_pad_mm_init"),
            (misc, "_misc_patterns_init"),
            (fake, "init_gpu_context"),
        ):
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, lambda *a, **k: None))
        yield
