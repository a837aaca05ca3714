"""Storage of 2- and 4-bit codes: packed along the last dimension, in runs of bytes.

A row's bytes are divided into runs of :func:`run_length` bytes, at most 16. A byte has ``8 / bits`` fields, lowest bits
first. In byte ``j`` of a run of ``r`` bytes they hold codes ``j`` and ``r + j`` of the run's codes, with 2 bits also
``2 r + j`` and ``3 r + j``. The same field of four adjacent bytes thus holds four adjacent codes, as a lane of an
integer tensor core reads them; with adjacent codes in one byte, each code would have to be moved. Rows are padded with
zero codes to whole bytes.
"""

import math

import torch
from torch import Tensor

PACKED_BITS = (2, 4)
LONGEST_RUN = 16  # bytes: the widest copy and load of a GPU's thread


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(f"bits={bits!r}: expected 2 or 4; 8-bit weights are stored as plain int8")


def packed_length(length: int, bits: int) -> int:
    """Bytes of a row of ``length`` codes of ``bits`` bits (``length`` itself for 8 bits)."""
    per_byte = 8 // bits
    return (length + per_byte - 1) // per_byte


def run_length(length: int, bits: int) -> int:
    """Bytes of a run in rows of ``length`` codes: the largest power of two, at most 16, that divides a row's bytes."""
    return math.gcd(packed_length(length, bits), LONGEST_RUN)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``[..., K]`` in ``[0, 2**bits)`` to uint8 ``[..., ceil(K * bits / 8)]``.

    Bits above ``bits`` are ignored rather than checked: reading the values would synchronize with the device.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.ndim == 0:
        raise TypeError(f"codes: {codes.dtype} of shape {list(codes.shape)}; expected uint8 [..., K]")
    per_byte = 8 // bits
    run, padding = run_length(codes.shape[-1], bits), -codes.shape[-1] % per_byte
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    fields = (codes & (2**bits - 1)).unflatten(-1, (-1, per_byte, run)).unbind(-2)
    packed = fields[0]
    for position, field in enumerate(fields[1:], 1):
        packed = packed | (field << (bits * position))
    return packed.flatten(-2)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of :func:`pack`: uint8 ``[..., ceil(length * bits / 8)]`` to uint8 codes ``[..., length]``."""
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != packed_length(length, bits):
        raise TypeError(
            f"packed: {packed.dtype} of shape {list(packed.shape)}; expected uint8 with a last dimension of "
            f"{packed_length(length, bits)} bytes for length={length}, bits={bits}"
        )
    mask, runs = 2**bits - 1, packed.unflatten(-1, (-1, run_length(length, bits)))
    codes = torch.stack([(runs >> shift) & mask for shift in range(0, 8, bits)], -2).flatten(-3)
    return codes if codes.shape[-1] == length else codes[..., :length].contiguous()


def unpack_weight(weight: Tensor, weight_zero_point: Tensor | None, bits: int, length: int) -> Tensor:
    """The int8 weight ``code - weight_zero_point`` that enters the product.

    weight: int8 ``[N, ..., length]`` for 8 bit (returned as it is), else packed uint8.
    weight_zero_point: int8 ``[N]``; required for 2 and 4 bit, None for 8.
    """
    if bits == 8:
        if weight.dtype != torch.int8 or weight_zero_point is not None:
            raise TypeError(f"weight: {weight.dtype}; 8-bit weights are int8 and have no weight_zero_point")
        return weight
    if weight_zero_point is None:
        raise TypeError(f"weight_zero_point: None; {bits}-bit weights need an int8 tensor [{weight.shape[0]}]")
    zero_point = weight_zero_point.reshape(-1, *[1] * (weight.ndim - 1))
    return unpack(weight, bits, length).view(torch.int8) - zero_point
