"""Linear layers and 1x1 convolutions."""

from ..compat import SymbolicGridFn, TritonTemplate
from . import source


@SymbolicGridFn
def _grid(*sizes_and_meta, cdiv):
    """Of a result [rows, columns], or of sums [SPLIT_K, rows, columns]."""
    *_, rows, columns, meta = sizes_and_meta
    products = 2 * columns if meta["GLU"] else columns
    return (cdiv(rows, meta["BLOCK_M"]) * cdiv(products, meta["BLOCK_N"]), meta["SPLIT_K"], 1)


template = TritonTemplate(name="inductor_kernels_gemm", grid=_grid, source=source("gemm.py.jinja"))
