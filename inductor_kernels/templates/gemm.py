"""Linear layers and 1x1 convolutions."""

from ..compat import SymbolicGridFn, TritonTemplate, mm_grid
from . import source


@SymbolicGridFn
def _shared_grid(shares, rows, columns, meta, *, cdiv):
    return (cdiv(rows, meta["BLOCK_M"]) * cdiv(columns, meta["BLOCK_N"]), shares, 1)


@SymbolicGridFn
def _glu_grid(rows, columns, meta, *, cdiv):
    return (cdiv(rows, meta["BLOCK_M"]) * cdiv(2 * columns, meta["BLOCK_N"]), 1, 1)


template = TritonTemplate(name="inductor_kernels_gemm", grid=mm_grid, source=source("gemm.py.jinja"))
split_k = TritonTemplate(name="inductor_kernels_gemm_split_k", grid=_shared_grid, source=source("gemm.py.jinja"))
glu = TritonTemplate(name="inductor_kernels_gemm_glu", grid=_glu_grid, source=source("gemm.py.jinja"))
