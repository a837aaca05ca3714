"""The template of convolutions: implicit GEMM, NHWC in and out, so that pointwise neighbours fuse."""

from collections.abc import Callable
from typing import Any

from ..compat import SymbolicGridFn, TritonTemplate
from . import source


@SymbolicGridFn
def _grid(*sizes_and_meta: Any, cdiv: Callable[[Any, int], Any]) -> tuple[Any, Any, int]:
    """The grid for a result [batch, height, width, channels], or for sums [SPLIT_K, batch, height, width, channels]."""
    *_, batch, height, width, channels, meta = sizes_and_meta
    return (cdiv(batch * height * width, meta["BLOCK_M"]) * cdiv(channels, meta["BLOCK_N"]), meta["SPLIT_K"], 1)


template = TritonTemplate(name="inductor_kernels_conv2d", grid=_grid, source=source("conv2d.py.jinja"))
