"""``torch.ops.mixdq_ao.nested_product``: 8-bit products from nested planes on a CPU.

CPU kernels take weights in a layout of their own, prepared once per weight and cached by tensor
(``inductor_kernels.weights``). Planes merged at every call would be a new weight each time, so the merged codes are
cached beside that layout; with ``weight_cache("memory")`` they are merged at every call. Other devices merge the planes
in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inductor_kernels import checks, weights
from inductor_kernels import ops as _ops  # noqa: F401  (registers torch.ops.inductor_kernels)

from . import nested

kernels = torch.ops.inductor_kernels
library = torch.library.Library("mixdq_ao", "DEF")
library.define(
    "nested_product(Tensor x, Tensor planes, Tensor? weight_sum, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int length, int[] geometry, ScalarType out_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def window(geometry: list[int]) -> list[Any]:
    """[stride, stride, padding, padding, dilation, dilation, groups] as operators' arguments; [] stays []."""
    return [geometry[:2], geometry[2:4], geometry[4:6], geometry[6]] if geometry else []


def product(
    x: Tensor,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    weight_sum: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    geometry: list[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """Calls the operator of ``inductor_kernels``: linear if ``geometry`` is empty, else a convolution (see ``window``);
    weight-only if ``zero_point`` is None."""
    where = window(geometry)
    if zero_point is None:
        operator = kernels.conv2d_weight_only if geometry else kernels.linear_weight_only
        return operator(x, weight, weight_zero_point, scale, bias, bits, *where)
    if geometry:
        return kernels.conv2d(
            x, weight, weight_zero_point, weight_sum, scale, zero_point, bias, bits, *where, out_dtype
        )
    return kernels.linear(
        x, weight, weight_zero_point, weight_sum, scale, zero_point, bias, None, bits, out_dtype
    )  # fmt: skip


def _nested_product(x, planes, weight_sum, scale, zero_point, bias, length, geometry, out_dtype) -> Tensor:
    prepared = weights.find(planes, None, 8, length) or weights.add(planes, None, 8, length)
    merged = prepared.forms.get("nested")
    if merged is None:
        merged = prepared.keep("nested", nested.merged(planes, length))
    return product(x, merged, None, weight_sum, scale, zero_point, bias, 8, geometry, out_dtype)


@torch.library.register_fake("mixdq_ao::nested_product", lib=library)
def _(x, planes, weight_sum, scale, zero_point, bias, length, geometry, out_dtype):
    n = planes.shape[1]
    if not geometry:
        return x.new_empty((*x.shape[:-1], n), dtype=out_dtype)
    kernel = planes.new_empty((n, planes.shape[2], planes.shape[3], length))
    size = checks.output_size(x, kernel, geometry[:2], geometry[2:4], geometry[4:6])
    return x.new_empty((x.shape[0], *size, n), dtype=out_dtype)


library.impl("nested_product", _nested_product, "CPU")
library.impl("nested_product", torch.library.fallthrough_kernel, "Autograd")
