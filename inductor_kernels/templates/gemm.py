"""Linear layers and 1x1 convolutions."""

from ..compat import TritonTemplate, mm_grid
from . import source

template = TritonTemplate(name="inductor_kernels_gemm", grid=mm_grid, source=source("gemm.py.jinja"))
