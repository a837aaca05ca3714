"""Random arguments of the operators, and their results in exact arithmetic with error bounds."""

import torch

from inductor_kernels import packing, reference

from .budget import Bounded, known, unit

BITS = (8, 4, 2)


def weight(shape, bits, *, extreme=False):
    """(stored weight, weight_zero_point or None, int8 weight)."""
    if bits == 8:
        w = torch.randint(-127, 128, shape, dtype=torch.int8)
        return (w.sign() * 127 if extreme else w), None, (w.sign() * 127 if extreme else w)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    zero_point = torch.randint(0, 2**bits, shape[:1], dtype=torch.int8)
    packed = packing.pack(codes, bits)
    return packed, zero_point, packing.unpack_weight(packed, zero_point, bits, shape[-1])


def codes(shape, dtype=torch.uint8, *, extreme=False):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    if extreme:
        x = (x > 20).to(torch.uint8) * 255
    return x if dtype == torch.uint8 else (x.to(torch.int16) - 128).to(torch.int8)


def zero_point(value=117):
    return torch.tensor(value, dtype=torch.int32)


def linear(lead=(5,), n=9, k=17, bits=8, dtype=torch.uint8, *, z=117, bias=True, rows=False,
           out=torch.float32, extreme=False):  # fmt: skip
    """Arguments of ``linear`` in order."""
    w, wzp, wi = weight((n, k), bits, extreme=extreme)
    row_scale = torch.rand(lead) + 0.5 if rows else None
    b = torch.randn(n).to(out) if bias else None
    x = codes((*lead, k), dtype, extreme=extreme)
    total = wi.sum(1, dtype=torch.int32)
    return x, w, wzp, total, torch.rand(n) / 1000, zero_point(z), b, row_scale, bits, out


def conv2d(batch=2, size=(9, 7), c=8, o=12, kernel=(3, 3), bits=8, dtype=torch.uint8, *, z=117, bias=True,
           stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, out=torch.float32, extreme=False):  # fmt: skip
    """Arguments of ``conv2d`` in order."""
    w, wzp, wi = weight((o, *kernel, c // groups), bits, extreme=extreme)
    b = torch.randn(o).to(out) if bias else None
    x = codes((batch, *size, c), dtype, extreme=extreme)
    total = wi.sum((1, 2, 3), dtype=torch.int32)
    geometry = (list(stride), list(padding), list(dilation), groups)
    return x, w, wzp, total, torch.rand(o) / 1000, zero_point(z), b, bits, *geometry, out


def apart(arguments):
    """The arguments with every vector replaced by one with the same values and a stride of 3."""

    def spread(t):
        wide = torch.full((len(t), 3), 99, dtype=t.dtype)
        wide[:, 1] = t
        return wide[:, 1]

    return tuple(spread(a) if isinstance(a, torch.Tensor) and a.dim() == 1 else a for a in arguments)


def weight_only(arguments, dtype, *, conv):
    """The arguments of the ``_weight_only`` variant for the same weight."""
    x = torch.randn(arguments[0].shape).to(dtype)
    rest = arguments[7:12] if conv else arguments[8:9]
    return x, *arguments[1:3], arguments[4], arguments[6], *rest


def exact(name, arguments):
    """The result of ``linear``, ``conv2d`` or a ``_weight_only`` variant before the last rounding. Codes may be
    ``Bounded``.

    A float32 sum of K products in any order errs by at most K units of the sum of their absolute values. Rounding
    errors really add up to sqrt(K) units; 8 is a margin. Sums of integers below 2**24 are exact in float32 as well.
    """
    conv = name.startswith("conv2d")
    only = name.endswith("weight_only")
    x, w, wzp = arguments[:3]
    scale, bias = (arguments[3], arguments[4]) if only else (arguments[4], arguments[6])
    groups = (arguments[9] if only else arguments[11]) if conv else 1
    bits = arguments[5] if only else arguments[7 if conv else 8]
    geometry = arguments[6:9] if only else arguments[8:11]
    if isinstance(x, torch.Tensor):
        x = known(x.double() + (128 if x.dtype == torch.int8 else 0))
    centered = x.value if only else x.value - arguments[5].double()
    wi = packing.unpack_weight(w, wzp, bits, centered.shape[-1] // groups).double()

    def times(x, w):
        return reference._conv(x, w, *geometry, groups) if conv else x @ w.t()

    size = times(centered.abs() + x.error, wi.abs())
    in_float32 = unit(torch.float32) * (wi[0].numel() ** 0.5 + 8) * size
    if not only:
        in_float32[size < 2**24] = 0
    y = Bounded(times(centered, wi), times(x.error, wi.abs()) + in_float32).rounded(torch.float32) * scale
    if name == "linear" and arguments[7] is not None:
        y = y * arguments[7].unsqueeze(-1)
    return y if bias is None else y + bias


def assert_right(name, arguments, y, dtype=torch.float32):
    """``y`` equals the exact result to float32 rounding and one rounding to ``dtype``."""
    exact(name, arguments).check(y, dtype)
