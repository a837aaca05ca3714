"""Integer linear and convolution operators for torch: 8-, 4- and 2-bit weights, on every device.

Importing the package registers ``torch.ops.inductor_kernels.*`` (see :mod:`inductor_kernels.ops`).
"""

from . import cpu, packing, reference
from .ops import library
from .weights import weight_cache

__all__ = ["cpu", "library", "packing", "reference", "weight_cache"]
