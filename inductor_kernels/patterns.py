"""Our operators in graphs about to be lowered, for what fuses more than Inductor does by itself."""

import torch

from .compat import Arg, CallFunction

PRODUCT = 10  # arguments of ``linear``
convert = torch.ops.prims.convert_element_type.default


def linear(users: int = 1) -> CallFunction:
    """``linear`` of any arguments, whose result ``users`` nodes read."""
    return CallFunction(torch.ops.inductor_kernels.linear.default, *(Arg() for _ in range(PRODUCT)), _users=users)
