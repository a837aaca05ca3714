"""The operators ``torch.ops.inductor_kernels.*``: schemas, shapes, and which implementation serves a device.

Activation codes ``x_q`` are uint8 in ``[0, 255]``, or the same codes minus 128 as int8. ``zero_point`` is an int32
tensor without dimensions in the unsigned convention; for int8 codes the effective one is ``zero_point - 128``.

Weights of 8 bit are int8 in ``[-127, 127]``; those of 4 and 2 bit are packed as :mod:`inductor_kernels.packing`
says and stand for ``code - weight_zero_point``, of two numbers from 0 to ``2**bits - 1``. ``weight_sum`` is int32
``[N]``, the sum of a channel's weights: redundant, but it spares a GPU kernel a pass over the weight. It may be None
where no kernel takes it (a CPU, the reference): small models need not store it.

    linear   y[m, n] = (sum_k x_q[m, k] w[n, k] - z weight_sum[n]) * scale[n] (* row_scale[m]) + bias[n]
    conv2d   the same sum over the window of a pixel; NHWC in and out, weight [O, kh, kw, C / groups];
             padding reads the zero point, so the correction stays one number per channel

The integer difference is exact, the rest float32, rounded once to ``out_dtype``. The ``_weight_only`` variants take
floating point activations and return their type.

``linear_post`` is ``linear`` and what follows it in a model, in float32 and rounded once; Inductor's graphs get it
where oneDNN does that as it multiplies (:mod:`inductor_kernels.post_ops`).

    linear_post   f(y + other), f one of "none", "gelu", "gelu_tanh" and "silu", other [..., N] of the result's type;
                  with ``out_inv_scale`` and ``out_zero_point`` the codes of that, as ``quantize`` makes them

``linear_glu`` is ``linear`` and a gate, in float32 and rounded once; Inductor's graphs get it on a GPU, where a program
computes both halves (:mod:`inductor_kernels.glu`).

    linear_glu    y[..., :N / 2] * f(y[..., N / 2:]), f one of "gelu", "gelu_tanh" and "silu"

For eager mode, where nothing fuses, ``quantize`` makes the codes in one pass,

    x_q = clamp(round(x * inv_scale + zero_point), 0, levels)    in float32, ties to even

and ``quantize_linear`` and ``quantize_conv2d`` are that and the product in one call, in the type of ``x``; an image
comes back in memory as ``x`` lies there, NHWC or NCHW, so that what follows is as fast as it was. Graphs
should hold the formula itself (``reference.quantize``), which Inductor fuses into whatever made ``x``.
"""

import functools
import importlib
import sys

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from . import checks, cpu, reference

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
    """Load the lowering with the first graph that has one of the operators: Inductor takes seconds to import."""
    if torch.compiler.is_compiling() or "torch._inductor.compile_fx" in sys.modules:
        _load_lowering()


def _quantize_shape(x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    checks.quantize(x, inv_scale, zero_point, levels)
    return torch.empty_like(x, dtype=reference.code_dtype(x.device))


def _linear_shape(x_q: Tensor, weight: Tensor, *rest) -> Tensor:
    _traced()
    checks.linear(x_q, weight, *rest)
    return x_q.new_empty((*x_q.shape[:-1], weight.shape[0]), dtype=rest[-1])


def _linear_post_shape(x_q: Tensor, weight: Tensor, *rest) -> Tensor:
    product, post = rest[:8], rest[8:]
    y = _linear_shape(x_q, weight, *product)
    checks.post(x_q, weight, y.dtype, *post)
    return y if post[2] is None else y.new_empty(y.shape, dtype=reference.code_dtype(y.device))


def _linear_glu_shape(x_q: Tensor, weight: Tensor, *rest) -> Tensor:
    y = _linear_shape(x_q, weight, *rest[:-1])
    checks.glu(weight, rest[-1])
    return y.new_empty((*y.shape[:-1], y.shape[-1] // 2))


def _conv2d_shape(x_q: Tensor, weight: Tensor, *rest) -> Tensor:
    _traced()
    checks.conv2d(x_q, weight, *rest)
    size = checks.output_size(x_q, weight, *rest[6:9])
    return x_q.new_empty((x_q.shape[0], *size, weight.shape[0]), dtype=rest[-1])


def _quantize_linear_shape(x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int, *rest) -> Tensor:
    codes = _quantize_shape(x, inv_scale, zero_point, levels)
    return _linear_shape(codes, *rest[:4], zero_point, rest[4], None, rest[5], x.dtype)


def _quantize_conv2d_shape(x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int, *rest) -> Tensor:
    codes = _quantize_shape(x, inv_scale, zero_point, levels)
    y = _conv2d_shape(codes, *rest[:4], zero_point, *rest[4:], x.dtype)
    return reference.like_planes(y) if reference.in_planes(x) else y


def _linear_weight_only_shape(x: Tensor, weight: Tensor, *rest) -> Tensor:
    _traced()
    checks.linear_weight_only(x, weight, *rest)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _conv2d_weight_only_shape(x: Tensor, weight: Tensor, *rest) -> Tensor:
    _traced()
    checks.conv2d_weight_only(x, weight, *rest)
    size = checks.output_size(x, weight, *rest[4:7])
    return x.new_empty((x.shape[0], *size, weight.shape[0]))


def _undisturbed(implementation):
    """The products are integer ones: nothing is recorded, whatever requires a gradient (a layer's bias does unless
    it is frozen), and autocast, which would round integers that are held in float32, does not reach them."""

    @functools.wraps(implementation)
    def run(*arguments):
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
        getattr(torch.ops.inductor_kernels, name).on_cpu = on_cpu  # for generated code: the dispatcher costs 9 us


_register()
