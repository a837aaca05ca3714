"""Patterns of our operators, for the rewrites in ``glu`` and ``post_ops``."""

import torch

from .compat import Arg, CallFunction

PRODUCT = 10  # number of arguments of ``linear``
convert = torch.ops.prims.convert_element_type.default


def linear(users: int = 1) -> CallFunction:
    """``linear`` with any arguments, whose result ``users`` nodes read."""
    return CallFunction(torch.ops.inductor_kernels.linear.default, *(Arg() for _ in range(PRODUCT)), _users=users)
