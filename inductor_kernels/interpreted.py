"""Repairs of Triton's interpreter for tests without a GPU: it lacks libdevice functions, inline PTX, an fma with one
rounding, and bfloat16 in products and conversions."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from . import ptx

_UNARY = {
    "abs": np.abs, "ceil": np.ceil, "cos": np.cos, "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1,
    "erf": np.vectorize(math.erf, otypes=[np.float64]), "fast_expf": np.exp, "floor": np.floor, "isinf": np.isinf,
    "isnan": np.isnan, "log": np.log, "log1p": np.log1p, "log2": np.log2, "nearbyint": np.rint, "rint": np.rint,
    "round": lambda v: np.trunc(v + np.copysign(0.5, v)), "rsqrt": lambda v: 1 / np.sqrt(v),
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "sin": np.sin, "sqrt": np.sqrt, "tanh": np.tanh, "trunc": np.trunc,
}  # fmt: skip
_BINARY = {"atan2": np.arctan2, "copysign": np.copysign, "fast_dividef": np.divide, "fmod": np.fmod, "pow": np.power}


def _on_tensors(function: Callable[..., Any], predicate: bool) -> Callable[..., Any]:
    """A NumPy function as a function of the interpreter's tensors. ``predicate``: it returns booleans."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def call(*args: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, tl.tensor))
        values = [arg.handle.data if isinstance(arg, tl.tensor) else arg for arg in args]
        with np.errstate(all="ignore"):
            result = np.asarray(function(*values))
        scalar = tl.int1 if predicate else first.dtype
        result = result.astype(np.bool_ if predicate else first.handle.data.dtype)
        kind = tl.block_type(scalar, list(result.shape)) if isinstance(first.type, tl.block_type) else scalar
        return tl.tensor(TensorHandle(result, scalar), kind)

    return call


@contextlib.contextmanager
def libdevice() -> Iterator[None]:
    """Implement Triton's libdevice functions, which return None in the interpreter."""
    from triton.language.extra import libdevice as module

    names = {**_UNARY, **_BINARY}
    before = {name: getattr(module, name, None) for name in names}
    for name, function in names.items():
        setattr(module, name, _on_tensors(function, name in ("isnan", "isinf")))
    try:
        yield
    finally:
        for name, function in before.items():
            if function is None:
                delattr(module, name)
            else:
                setattr(module, name, function)


def _wide(handle: Any) -> np.ndarray:
    """The data of a handle; bfloat16, which the interpreter stores as raw 16-bit integers, is converted to float32."""
    import triton.language as tl

    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _narrow(data: Any) -> np.ndarray:
    """Numbers as raw bfloat16, rounded to nearest as on hardware; the interpreter truncates."""
    array = np.asarray(data, dtype=np.float32)
    rounded = torch.from_numpy(np.atleast_1d(array).copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    return rounded.reshape(array.shape)


@contextlib.contextmanager
def bfloat16() -> Iterator[None]:
    """Repair the interpreter's arithmetic on bfloat16."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar != tl.bfloat16:
            return TensorHandle(_narrow(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        return TensorHandle(np.matmul(_wide(a), _wide(b)) + d.data, d.dtype.scalar)

    with (
        mock.patch.object(InterpreterBuilder, "cast_impl", cast_impl),
        mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
    ):
        yield


@contextlib.contextmanager
def fma() -> Iterator[None]:
    """Give fma one rounding; before Triton 3.9 the interpreter rounds the product as well. float32 is computed in
    float64 and rounded twice, which differs in about one case in 2^29."""
    from triton._C.libtriton import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(interpreter, "fma_fp32"):
        yield
        return
    twice = InterpreterBuilder.create_fma

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return twice(self, x, y, z)
        wide = [value.data.astype(np.float64) for value in (x, y, z)]
        return TensorHandle((wide[0] * wide[1] + wide[2]).astype(z.data.dtype), z.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_fma", create_fma):
        yield


class _Results(list[Any]):
    """The results of inline assembly, as MLIR's operations have them."""

    def get_result(self, index: int) -> Any:
        return self[index]


@contextlib.contextmanager
def inline_asm() -> Iterator[None]:
    """Run inline assembly whose operands are 8-bit numbers, four to a register."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_inline_asm(
        self: Any, text: str, constraints: str, values: Sequence[Any], types: Sequence[Any], is_pure: bool, pack: int
    ) -> _Results:
        arrays = [np.ascontiguousarray(value.data) for value in values]
        shape = arrays[0].shape
        if pack != 4 or any(array.itemsize != 1 or array.shape != shape or array.size % 4 for array in arrays):
            raise NotImplementedError(f"inline PTX: pack={pack} of {[a.dtype for a in arrays]}; expected four bytes")
        words = ptx.run(text, len(types), [array.reshape(-1).view(np.uint32) for array in arrays])
        numbers = [word.view(np.int8).reshape(shape) for word in words]
        return _Results(TensorHandle(n, t.scalar) for n, t in zip(numbers, types, strict=True))

    with mock.patch.object(InterpreterBuilder, "create_inline_asm", create_inline_asm):
        yield


def repairs() -> tuple[contextlib.AbstractContextManager, ...]:
    """All repairs, each a context manager to enter."""
    return libdevice(), bfloat16(), fma(), inline_asm()
