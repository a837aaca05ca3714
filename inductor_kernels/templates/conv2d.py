"""Convolution as an implicit GEMM: NHWC in and out, so that pointwise neighbours fuse."""

from ..compat import SymbolicGridFn, TritonTemplate
from . import source


@SymbolicGridFn
def _grid(*sizes_and_meta, cdiv):
    """Of a result [batch, height, width, channels], or of sums [SPLIT_K, batch, height, width, channels]."""
    *_, batch, height, width, channels, meta = sizes_and_meta
    return (cdiv(batch * height * width, meta["BLOCK_M"]) * cdiv(channels, meta["BLOCK_N"]), meta["SPLIT_K"], 1)


template = TritonTemplate(name="inductor_kernels_conv2d", grid=_grid, source=source("conv2d.py.jinja"))
