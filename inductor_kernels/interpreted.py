"""numpy versions of the device functions that Triton's interpreter lacks."""

import contextlib
import math

import numpy as np

_UNARY = {
    "abs": np.abs, "ceil": np.ceil, "cos": np.cos, "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1,
    "erf": np.vectorize(math.erf, otypes=[np.float64]), "floor": np.floor, "isinf": np.isinf, "isnan": np.isnan,
    "log": np.log, "log1p": np.log1p, "log2": np.log2, "nearbyint": np.rint, "rint": np.rint,
    "round": lambda v: np.trunc(v + np.copysign(0.5, v)), "rsqrt": lambda v: 1 / np.sqrt(v),
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "sin": np.sin, "sqrt": np.sqrt, "tanh": np.tanh, "trunc": np.trunc,
}  # fmt: skip
_BINARY = {"atan2": np.arctan2, "copysign": np.copysign, "fmod": np.fmod, "pow": np.power}


def _on_tensors(function, predicate: bool):
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def call(*args):
        first = next(arg for arg in args if isinstance(arg, tl.tensor))
        values = [arg.handle.data if isinstance(arg, tl.tensor) else arg for arg in args]
        with np.errstate(all="ignore"):
            result = np.asarray(function(*values))
        scalar = tl.int1 if predicate else first.type.scalar
        result = result.astype(np.bool_ if predicate else first.handle.data.dtype)
        kind = tl.block_type(scalar, list(result.shape)) if first.type.is_block() else scalar
        return tl.tensor(TensorHandle(result, scalar), kind)

    return call


@contextlib.contextmanager
def libdevice():
    """Triton's libdevice functions return None in the interpreter; give them a body for a while."""
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
