"""Names quantized layers and their precision in profiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

from ..compat import uncompiled
from ..layers import find_products
from ..quantize.tensor import is_quantized


@contextmanager
def named_layers(model: nn.Module) -> Iterator[None]:
    """Makes every quantized layer of an uncompiled ``model`` a named range in ``torch.profiler``, for the block:

        with named_layers(pipe.unet), torch.profiler.profile() as record:
            pipe("a large red circle")
        print(record.key_averages().table("cpu_time_total"))

    Ranges are named as "down_blocks.1.attentions.0.proj_in (W8A8)". Layers of a compiled model are fused with each
    other and have no ranges of their own; Inductor names its kernels.
    """
    model = uncompiled(model)
    handles = []
    try:
        for name, module in find_products(model).items():
            if is_quantized(module.weight):
                weight: Any = module.weight
                enter, leave = _range(f"{name} ({weight.describe()})")
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _range(label: str) -> tuple[Any, Any]:
    open_ranges: list[record_function] = []

    def enter(*_: object) -> None:
        open_ranges.append(record_function(label))
        open_ranges[-1].__enter__()

    def leave(*_: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return enter, leave
