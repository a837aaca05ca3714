"""Hadamard matrices, and rotating a tensor's channels by them in blocks."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rotated(x: Tensor, size: int) -> Tensor:
    """R x for every block of ``size`` along the last dimension. R is the Hadamard matrix of that order over sqrt(size),
    an orthogonal matrix with entries of one magnitude, which spreads outliers over the channels of a block.

    Raises ValueError where no such matrix is known (see ``hadamard``).
    """
    matrix = hadamard(size)
    if matrix is None:
        raise ValueError(f"no Hadamard matrix of order {size} is known here")
    rotation = matrix.to(x.device, x.dtype) / size**0.5
    return (x.unflatten(-1, (-1, size)) @ rotation.T).flatten(-2)


@lru_cache
def hadamard(order: int) -> Tensor | None:
    """A matrix [order, order] of 1 and -1 with orthogonal rows, float64. None where neither doubling (Sylvester) nor
    Paley's two constructions (J. Math. Phys. 12, 1933) over a prime give one: below 200 for 52, 92, 100, 116, 156, 172,
    184, 188 and orders above 2 that are not multiples of 4."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 and order != 2:
        return None
    half = hadamard(order // 2)
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    if _prime(order - 1):  # 3 modulo 4
        core = _paley_core(order - 1)
        return core + torch.eye(order, dtype=torch.float64)
    if _prime(order // 2 - 1) and order // 2 % 4 == 2:  # 1 modulo 4
        core, one = _paley_core(order // 2 - 1), torch.eye(order // 2, dtype=torch.float64)
        plus, minus = (
            torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(),
            torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double(),
        )
        return torch.kron(core, plus) + torch.kron(one, minus)
    return None


def _paley_core(q: int) -> Tensor:
    """[q + 1, q + 1]: Jacobsthal's matrix of quadratic residues modulo the prime q with a border, C C^T = q I;
    symmetric where q is 1 modulo 4, antisymmetric where it is 3."""
    squares = {i * i % q for i in range(1, q)}
    symbol = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[1:, 1:] = symbol[(index[:, None] - index) % q]
    core[0, 1:] = 1.0
    core[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    return core


def _prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
