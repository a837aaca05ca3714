"""The template of linear layers and 1x1 convolutions."""

from collections.abc import Callable
from typing import Any

from ..compat import SymbolicGridFn, TritonTemplate
from . import source


@SymbolicGridFn
def _grid(*sizes_and_meta: Any, cdiv: Callable[[Any, int], Any]) -> tuple[Any, Any, int]:
    """The grid for a result [rows, columns], or for sums [SPLIT_K, rows, columns]."""
    *_, rows, columns, meta = sizes_and_meta
    products = 2 * columns if meta["GLU"] else columns
    return (cdiv(rows, meta["BLOCK_M"]) * cdiv(products, meta["BLOCK_N"]), meta["SPLIT_K"], 1)


template = TritonTemplate(name="inductor_kernels_gemm", grid=_grid, source=source("gemm.py.jinja"))
