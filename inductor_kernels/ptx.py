"""Interprets inline PTX on NumPy arrays: the few instructions with which the templates unpack codes.

Tests without a GPU thus run the same text that a GPU's assembler gets.
"""

import re
from collections.abc import Callable

import numpy as np

BINARY: dict[str, Callable[..., np.ndarray]] = {
    "shr.u32": np.right_shift,
    "sub.u32": np.subtract,
    "xor.b32": np.bitwise_xor,
}


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """The bitwise function of three numbers with truth table ``table``: its bit ``4 a + 2 b + c`` for bits a, b, c."""
    ones = (i for i in range(8) if table >> i & 1)
    cases = ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in ones)
    return np.bitwise_or.reduce([*cases, np.zeros_like(a)])


def run(text: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Run ``{ .reg .b32 x, y; instruction; ... }`` and return its outputs, the registers ``$0`` and following.

    inputs: uint32, of one shape, in the registers after the outputs. Raises NotImplementedError naming an unsupported
    instruction.
    """
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for line in filter(None, map(str.strip, text.strip("{} ").split(";"))):
        name, *operands = re.split(r"[\s,]+", line)
        if name == ".reg":
            continue
        target, *sources = operands
        values = [registers[s] if s in registers else np.full_like(inputs[0], int(s, 0)) for s in sources]
        if name == "lop3.b32":
            registers[target] = lop3(values[0], values[1], values[2], int(sources[3], 0))
        elif name in BINARY:
            registers[target] = BINARY[name](*values)
        else:
            raise NotImplementedError(f"inline PTX: {line!r}; expected lop3.b32 or one of {', '.join(BINARY)}")
    return [registers[f"${i}"] for i in range(outputs)]
