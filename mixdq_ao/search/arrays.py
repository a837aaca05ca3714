"""The array type of the allocation programs and estimates, in a module without heavy imports."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
