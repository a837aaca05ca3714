"""Convolution as an implicit GEMM: NHWC in and out, so that pointwise neighbours fuse."""

from ..compat import SymbolicGridFn, TritonTemplate
from . import source


@SymbolicGridFn
def _grid(batch, height, width, channels, meta, *, cdiv):
    return (cdiv(batch * height * width, meta["BLOCK_M"]) * cdiv(channels, meta["BLOCK_N"]), 1, 1)


@SymbolicGridFn
def _shared_grid(shares, batch, height, width, channels, meta, *, cdiv):
    return (cdiv(batch * height * width, meta["BLOCK_M"]) * cdiv(channels, meta["BLOCK_N"]), shares, 1)


template = TritonTemplate(name="inductor_kernels_conv2d", grid=_grid, source=source("conv2d.py.jinja"))
split_k = TritonTemplate(name="inductor_kernels_conv2d_split_k", grid=_shared_grid, source=source("conv2d.py.jinja"))
