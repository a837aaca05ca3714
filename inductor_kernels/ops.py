"""The operators ``torch.ops.inductor_kernels.*``: schemas, fake implementations, and the implementation per device.

Activation codes ``x_q`` are uint8 in ``[0, 255]``, or the same codes minus 128 as int8. ``zero_point`` is an int32
tensor without dimensions in the unsigned convention; for int8 codes the effective one is ``zero_point - 128``.

8-bit weights are int8 in ``[-127, 127]``. 4- and 2-bit weights are packed codes (:mod:`inductor_kernels.packing`) that
stand for ``code - weight_zero_point``, both from 0 to ``2**bits - 1``. ``weight_sum`` is int32 ``[N]``, the sum of each
output channel's weights: redundant, but it spares a GPU kernel a pass over the weight. It may be None where no kernel
reads it (on a CPU, in the reference), so that small models need not store it.

    linear   y[m, n] = (sum_k x_q[m, k] w[n, k] - z weight_sum[n]) * scale[n] (* row_scale[m]) + bias[n]
    conv2d   the same sum over the window of a pixel; NHWC in and out, weight [O, kh, kw, C / groups];
             padding reads the zero point, so the correction stays one number per channel

The integer difference is exact; the rest is float32, rounded once to ``out_dtype``. The ``_weight_only`` variants take
floating point activations and return their type.

``linear_post`` is ``linear`` with an epilogue, in float32 and rounded once. :mod:`inductor_kernels.post_ops` puts it
into graphs for a CPU where oneDNN can fuse the epilogue.

    linear_post   f(y + other), f one of "none", "gelu", "gelu_tanh" and "silu", other [..., N] of the result's type;
                  with ``out_inv_scale`` and ``out_zero_point`` the codes of that result, as ``quantize`` makes them

``linear_glu`` is ``linear`` with a gate, in float32 and rounded once. :mod:`inductor_kernels.glu` puts it into graphs
for a GPU, where one program computes a tile of values together with its gates.

    linear_glu    y[..., :N / 2] * f(y[..., N / 2:]), f one of "gelu", "gelu_tanh" and "silu"

For eager mode, where nothing fuses, ``quantize`` makes the codes in one pass,

    x_q = clamp(round(x * inv_scale + zero_point), 0, levels)    in float32, ties to even

and ``quantize_linear`` and ``quantize_conv2d`` quantize and multiply in one call, with results in the type of ``x``.
The image that ``quantize_conv2d`` returns has the memory layout of ``x`` (NHWC or NCHW), so that the next operators
are as fast as in the original model. Graphs should hold the formula itself (``reference.quantize``), which Inductor
fuses into the producer of ``x``.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, cpu, reference
from .compat_eager import unset_fake_temporarily

_SCHEMAS = (
    "quantize(Tensor x, Tensor inv_scale, Tensor zero_point, int levels) -> Tensor",
    "linear(Tensor x_q, Tensor weight, Tensor? weight_zero_point, Tensor? weight_sum, Tensor scale, "
    "Tensor zero_point, Tensor? bias, Tensor? row_scale, int weight_bits, ScalarType out_dtype) -> Tensor",
    "linear_post(Tensor x_q, Tensor weight, Tensor? weight_zero_point, Tensor? weight_sum, Tensor scale, "
    "Tensor zero_point, Tensor? bias, Tensor? row_scale, int weight_bits, ScalarType out_dtype, "
    "Tensor? other, str activation, Tensor? out_inv_scale, Tensor? out_zero_point) -> Tensor",
    "linear_glu(Tensor x_q, Tensor weight, Tensor? weight_zero_point, Tensor? weight_sum, Tensor scale, "
    "Tensor zero_point, Tensor? bias, Tensor? row_scale, int weight_bits, ScalarType out_dtype, "
    "str activation) -> Tensor",
    "conv2d(Tensor x_q, Tensor weight, Tensor? weight_zero_point, Tensor? weight_sum, Tensor scale, "
    "Tensor zero_point, Tensor? bias, int weight_bits, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, int groups, ScalarType out_dtype) -> Tensor",
    "quantize_linear(Tensor x, Tensor inv_scale, Tensor zero_point, int levels, Tensor weight, "
    "Tensor? weight_zero_point, Tensor? weight_sum, Tensor scale, Tensor? bias, int weight_bits) -> Tensor",
    "quantize_conv2d(Tensor x, Tensor inv_scale, Tensor zero_point, int levels, Tensor weight, "
    "Tensor? weight_zero_point, Tensor? weight_sum, Tensor scale, Tensor? bias, int weight_bits, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, int groups) -> Tensor",
    "linear_weight_only(Tensor x, Tensor weight, Tensor? weight_zero_point, Tensor scale, Tensor? bias, "
    "int weight_bits) -> Tensor",
    "conv2d_weight_only(Tensor x, Tensor weight, Tensor? weight_zero_point, Tensor scale, Tensor? bias, "
    "int weight_bits, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, int groups) -> Tensor",
)

library = torch.library.Library("inductor_kernels", "DEF")


@functools.cache
def _load_lowering() -> None:
    with unset_fake_temporarily():
        importlib.import_module("inductor_kernels.lowering")


def _traced() -> None:
    """Load the lowerings when the first graph with one of the operators is traced, not before: importing Inductor takes
    seconds."""
    if torch.compiler.is_compiling() or "torch._inductor.compile_fx" in sys.modules:
        _load_lowering()


def _quantize_shape(x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    checks.quantize(x, inv_scale, zero_point, levels)
    return torch.empty_like(x, dtype=reference.code_dtype(x.device))


def _linear_shape(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, row_scale: Tensor | None, weight_bits: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _traced()
    checks.linear(
        x_q, weight, weight_zero_point, weight_sum, scale, zero_point, bias, row_scale, weight_bits, out_dtype
    )
    return x_q.new_empty((*x_q.shape[:-1], weight.shape[0]), dtype=out_dtype)


def _linear_post_shape(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, row_scale: Tensor | None, weight_bits: int, out_dtype: torch.dtype,
    other: Tensor | None, activation: str, out_inv_scale: Tensor | None, out_zero_point: Tensor | None,
) -> Tensor:  # fmt: skip
    product = (weight, weight_zero_point, weight_sum, scale, zero_point, bias, row_scale, weight_bits)
    y = _linear_shape(x_q, *product, out_dtype)
    checks.post(x_q, weight, out_dtype, other, activation, out_inv_scale, out_zero_point)
    return y if out_inv_scale is None else y.new_empty(y.shape, dtype=reference.code_dtype(y.device))


def _linear_glu_shape(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, row_scale: Tensor | None, weight_bits: int, out_dtype: torch.dtype,
    activation: str,
) -> Tensor:  # fmt: skip
    product = (weight, weight_zero_point, weight_sum, scale, zero_point, bias, row_scale, weight_bits)
    y = _linear_shape(x_q, *product, out_dtype)
    checks.glu(weight, activation)
    return y.new_empty((*y.shape[:-1], y.shape[-1] // 2))


def _conv2d_shape(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, weight_bits: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _traced()
    checks.conv2d(
        x_q, weight, weight_zero_point, weight_sum, scale, zero_point, bias, weight_bits,
        stride, padding, dilation, groups, out_dtype,
    )  # fmt: skip
    size = checks.output_size(x_q, weight, stride, padding, dilation)
    return x_q.new_empty((x_q.shape[0], *size, weight.shape[0]), dtype=out_dtype)


def _quantize_linear_shape(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int, weight: Tensor, weight_zero_point: Tensor | None,
    weight_sum: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int,
) -> Tensor:  # fmt: skip
    codes = _quantize_shape(x, inv_scale, zero_point, levels)
    product = (weight, weight_zero_point, weight_sum, scale, zero_point, bias, None, weight_bits)
    return _linear_shape(codes, *product, x.dtype)


def _quantize_conv2d_shape(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int, weight: Tensor, weight_zero_point: Tensor | None,
    weight_sum: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    codes = _quantize_shape(x, inv_scale, zero_point, levels)
    product = (weight, weight_zero_point, weight_sum, scale, zero_point, bias, weight_bits)
    y = _conv2d_shape(codes, *product, stride, padding, dilation, groups, x.dtype)
    return reference.like_planes(y) if reference.in_planes(x) else y


def _linear_weight_only_shape(
    x: Tensor, weight: Tensor, weight_zero_point: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int
) -> Tensor:
    _traced()
    checks.linear_weight_only(x, weight, weight_zero_point, scale, bias, weight_bits)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _conv2d_weight_only_shape(
    x: Tensor, weight: Tensor, weight_zero_point: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    _traced()
    checks.conv2d_weight_only(x, weight, weight_zero_point, scale, bias, weight_bits, stride, padding, dilation, groups)
    size = checks.output_size(x, weight, stride, padding, dilation)
    return x.new_empty((x.shape[0], *size, weight.shape[0]))


def _undisturbed(implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``implementation`` without autograd and autocast. The products are of integers, so nothing is recorded, even
    where an argument requires a gradient (a layer's bias does unless it is frozen); autocast would round integers that
    are held in float32."""

    @functools.wraps(implementation)
    def run(*arguments: Any) -> Tensor:
        device = arguments[0].device.type
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(device):
            return implementation(*arguments)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return implementation(*arguments)

    return run


def _register() -> None:
    for schema in _SCHEMAS:
        name = schema.split("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        library.impl(name, _undisturbed(getattr(reference, name)), "CompositeExplicitAutograd")
        on_cpu = _undisturbed(getattr(cpu, name))
        library.impl(name, on_cpu, "CPU")
        torch.library.register_fake(f"inductor_kernels::{name}", globals()[f"_{name}_shape"], lib=library)
        getattr(torch.ops.inductor_kernels, name).on_cpu = on_cpu  # generated code calls it: the dispatcher costs 9 us


_register()
