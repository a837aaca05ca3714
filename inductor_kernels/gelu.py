"""The tanh form of GELU after a product on a CPU, as generated code computes it fastest.

    y (1 + tanh u) / 2  =  y sigmoid(2 u)        u = sqrt(2 / pi) (y + 0.044715 y^3)

The tanh that generated code calls takes three times as long as an exponential; the error stays at a few units of
float32, and for negative y, where 1 + tanh u cancels, it shrinks. Measured on an EPYC (Zen 3), one thread: linear,
GELU, quantize, linear of 1024 x 640 -> 2560 -> 640 with 4-bit weights run 1.09 times as fast, the first product and
GELU alone 1.19 times. Other parts of a model are left as they are.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import compat
from .compat import KeywordArg
from .nodes import is_ours


def _with_sigmoid(y: Tensor) -> Tensor:
    return y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y))


def _follows_product(match: Any, *, y: Any) -> bool:
    if match.output_node().meta["val"].device.type != "cpu" or compat.config.cpu_backend != "cpp":
        return False
    if y.target is torch.ops.prims.convert_element_type.default:  # 16-bit results are widened first
        y = y.args[0]
    return is_ours(y)


def _replace(match: Any, *, y: Any) -> None:
    match.replace_by_example(_with_sigmoid, [y])


def register() -> None:
    """After :mod:`inductor_kernels.post_ops`, which leaves this to oneDNN where that is faster still."""
    patterns = compat.activation_patterns()
    if "gelu_tanh" in patterns:
        compat.rewrite(patterns["gelu_tanh"][0](KeywordArg("y")), _follows_product, _replace, stage=1)
