"""The operators on a CPU, each by the kernel that :mod:`inductor_kernels.routes` chooses.

Weights prepared for a kernel are cached outside the graph (:mod:`inductor_kernels.weights`).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import avx2, checks, onednn, reference, routes, weights

CODES = (torch.uint8, torch.int8)


class _Geometry(NamedTuple):
    """Geometry of a convolution; its prepared weight is cached under it. ``shape``: of the codes, [B, H, W, C]."""

    shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def differs_in_batch_only(self, other: "_Geometry") -> bool:
        return self.shape[1:] == other.shape[1:] and self[1:] == other[1:]


def _centered(x_q: Tensor, zero_point: int) -> Tensor:
    """float32 codes minus the zero point."""
    x = x_q.to(torch.float32)
    zero_point -= 128 if x_q.dtype == torch.int8 else 0
    return x.add_(float(-zero_point)) if zero_point else x  # half the cost of sub_ on a small tensor


def _scaled(total: Tensor, scale: Tensor, row_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Apply scales and bias in place to ``total``, a float32 tensor that the caller owns."""
    if row_scale is not None:
        total.mul_(row_scale.unsqueeze(-1))
    if bias is None:
        total.mul_(scale)
    else:
        torch.addcmul(bias.float(), total, scale, out=total)
    return total if dtype == torch.float32 else total.to(dtype)


def _packed_linear(prepared: weights.Prepared, weight: Tensor, zero_point: Tensor | None) -> Tensor:
    packed = prepared.forms.get("onednn")
    if packed is None:
        w = weights.integers(weight, zero_point, prepared.bits, prepared.length)
        packed = prepared.keep("onednn", onednn.pack_linear(w))
    return packed


def _written(out_dtype: torch.dtype) -> torch.dtype:
    """The result type to request from oneDNN where the caller wants ``out_dtype``."""
    return out_dtype if onednn.writes(out_dtype) else torch.float32


def _plain(x_q: Tensor, scale: Tensor, bias: Tensor | None, n: int) -> bool:
    """Cheap checks of the arguments beside a weight that was checked before; where they fail, the full checks run and
    name the mistake."""
    return x_q.dtype in CODES and _vectors(scale, bias, n)


def _vectors(scale: Tensor, bias: Tensor | None, n: int) -> bool:
    return scale.dtype is torch.float32 and scale.numel() == n and (bias is None or bias.numel() == n)


def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """``inductor_kernels::quantize``."""
    checks.quantize(x, inv_scale, zero_point, levels)
    if x.dtype is torch.float32 and avx2.available():
        return avx2.quantize(x, inv_scale, zero_point, levels)
    return reference.quantize(x, inv_scale, zero_point, levels)


def linear(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, row_scale: Tensor | None, weight_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::linear``."""
    n, k = weight.shape[0], x_q.shape[-1] if x_q.ndim else 0
    prepared = weights.find(weight, weight_zero_point, weight_bits, k)
    if prepared is None or row_scale is not None or not _plain(x_q, scale, bias, n):
        arguments = (x_q, weight, weight_zero_point, weight_sum, scale, zero_point, bias, row_scale)
        checks.linear(*arguments, weight_bits, out_dtype)
        if n == 0 or k == 0:
            return reference.linear(*arguments, weight_bits, out_dtype)
        prepared = prepared or weights.add(weight, weight_zero_point, weight_bits, k)
    z = int(zero_point)
    if not routes.takes_onednn(x_q.numel() * n, prepared, weight):
        if routes.has_avx2():
            packed = prepared.forms.get("avx2")
            if packed is None:
                w = weights.integers(weight, weight_zero_point, weight_bits, k)
                packed = prepared.keep("avx2", avx2.pack_linear(w))
            y = avx2.product(packed, x_q, scale, z, bias, row_scale, (*x_q.shape[:-1], n))
            return y if out_dtype is torch.float32 else y.to(out_dtype)
        total = F.linear(_centered(x_q, z), _float_linear(prepared, weight, weight_zero_point))
        return _scaled(total, scale, row_scale, bias, out_dtype)
    packed = _packed_linear(prepared, weight, weight_zero_point)
    if row_scale is None:
        return onednn.linear(x_q, z, packed, scale, bias, dtype=_written(out_dtype)).to(out_dtype)
    total = onednn.linear(x_q, z, packed, scale, None).mul_(row_scale.unsqueeze(-1))
    return (total if bias is None else total.add_(bias)).to(out_dtype)


linear_glu = reference.linear_glu  # never in graphs for a CPU


def linear_post(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, row_scale: Tensor | None, weight_bits: int, out_dtype: torch.dtype,
    other: Tensor | None, activation: str, out_inv_scale: Tensor | None, out_zero_point: Tensor | None,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::linear_post``: fused where oneDNN multiplies. A fused sum has the same bits as a separate
    addition."""
    n, k = weight.shape[0], x_q.shape[-1] if x_q.ndim else 0
    product = (x_q, weight, weight_zero_point, weight_sum, scale, zero_point, bias, row_scale, weight_bits)
    post = (other, activation, out_inv_scale, out_zero_point)
    prepared = weights.find(weight, weight_zero_point, weight_bits, k)
    if prepared is None or not _plain(x_q, scale, bias, n):
        checks.linear(*product, out_dtype)
    checks.post(x_q, weight, out_dtype, *post)
    alone = other is None or (activation == "none" and out_inv_scale is None and onednn.writes(out_dtype))
    multiplications = x_q.numel() * n
    if row_scale is not None or not alone or not multiplications:
        prepared = None
    elif prepared is None:
        prepared = weights.add(weight, weight_zero_point, weight_bits, k)
    if prepared is None or not routes.takes_onednn(multiplications, prepared, weight):
        return reference.post(linear(*product, torch.float32), out_dtype, *post)
    z, packed = int(zero_point), _packed_linear(prepared, weight, weight_zero_point)
    if other is not None:
        return onednn.linear_add(x_q, z, packed, scale, bias, other, out_dtype)
    if out_inv_scale is not None and out_zero_point is not None:
        into = 1 / float(out_inv_scale), int(out_zero_point), torch.uint8
    else:
        into = 1.0, 0, _written(out_dtype)
    y = onednn.linear(x_q, z, packed, scale, bias, *into, activation)
    return y if y.dtype in (out_dtype, torch.uint8) else y.to(out_dtype)


def quantize_linear(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int, weight: Tensor, weight_zero_point: Tensor | None,
    weight_sum: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::quantize_linear``; the C kernel quantizes rows as it reads them."""
    n, k = weight.shape[0], x.shape[-1] if x.ndim else 0
    if x.dtype is torch.float32 and routes.has_avx2() and _vectors(scale, bias, n):
        prepared = weights.find(weight, weight_zero_point, weight_bits, k)
        packed = None if prepared is None else prepared.forms.get("avx2")
        if prepared is not None and packed is not None and not routes.takes_onednn(x.numel() * n, prepared, weight):
            checks.quantize(x, inv_scale, zero_point, levels)
            z, shape = int(zero_point), (*x.shape[:-1], n)
            return avx2.product(packed, x, scale, z, bias, None, shape, float(inv_scale), levels)
    codes = quantize(x, inv_scale, zero_point, levels)
    rest = (weight, weight_zero_point, weight_sum, scale, zero_point, bias, None, weight_bits)
    return linear(codes, *rest, x.dtype)


def _float_linear(prepared: weights.Prepared, weight: Tensor, zero_point: Tensor | None) -> Tensor:
    form = prepared.forms.get("float32")
    if form is None:
        w = weights.integers(weight, zero_point, prepared.bits, prepared.length)
        form = prepared.keep("float32", w.to(torch.float32))
    return form


def _float_conv(prepared: weights.Prepared, weight: Tensor, zero_point: Tensor | None) -> Tensor:
    """The float32 weight in torch's dimension order [O, C, kh, kw], channels last in memory."""
    return _float_linear(prepared, weight, zero_point).permute(0, 3, 1, 2)


def conv2d(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, weight_bits: int, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::conv2d``."""
    rest = (weight, weight_zero_point, weight_sum, scale, zero_point, bias, weight_bits)
    return _conv2d(x_q, *rest, stride, padding, dilation, groups, out_dtype, planes=False)


def _conv2d(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, weight_bits: int, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, out_dtype: torch.dtype, planes: bool,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::conv2d``. With ``planes`` the C kernel writes the result in the memory order of [B, O, OH,
    OW]; other kernels write their usual order."""
    length = x_q.shape[-1] // groups if groups > 0 else 0
    prepared = weights.find(weight, weight_zero_point, weight_bits, length)
    n = weight.shape[0]
    geometry = _Geometry(x_q.shape, tuple(stride), tuple(padding), tuple(dilation), groups)
    packed = None if prepared is None else prepared.forms.get(geometry)
    z = int(zero_point)
    if packed is None or not _plain(x_q, scale, bias, n):
        arguments = (x_q, weight, weight_zero_point, weight_sum, scale, zero_point, bias, weight_bits)
        checks.conv2d(*arguments, stride, padding, dilation, groups, out_dtype)
        if x_q.numel() == 0 or weight.numel() == 0:
            return reference.conv2d(*arguments, stride, padding, dilation, groups, out_dtype)
        prepared = prepared or weights.add(weight, weight_zero_point, weight_bits, length)
        packed = _layout_conv(x_q, weight, weight_zero_point, prepared, geometry)
        prepared.keep(geometry, packed)
    if isinstance(packed, avx2.PackedWeight):
        size = (packed.layout.out_h, packed.layout.out_w)
        y = avx2.product(packed, x_q, scale, z, bias, None, (x_q.shape[0], *size, n), planes=planes)
        return y if out_dtype is torch.float32 else y.to(out_dtype)
    if not _is_onednn(packed):  # the float32 form
        x = _centered(x_q, z).permute(0, 3, 1, 2)
        total = F.conv2d(x, packed, None, stride, padding, dilation, groups)
        return _scaled(total.permute(0, 2, 3, 1).contiguous(), scale, None, bias, out_dtype)
    into = _written(out_dtype)
    return onednn.conv2d(x_q, z, packed, scale, bias, stride, padding, dilation, groups, into).to(out_dtype)


def quantize_conv2d(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int, weight: Tensor, weight_zero_point: Tensor | None,
    weight_sum: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int, stride: list[int],
    padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::quantize_conv2d``; the result has the memory layout (NHWC or NCHW) of ``x``."""
    checks.quantize(x, inv_scale, zero_point, levels)
    planes = reference.in_planes(x)
    if planes and x.dtype is torch.float32 and avx2.available():
        codes = avx2.quantize_planes(x, inv_scale, zero_point, levels)
    else:
        codes = quantize(x, inv_scale, zero_point, levels)
    rest = (weight, weight_zero_point, weight_sum, scale, zero_point, bias, weight_bits)
    y = _conv2d(codes, *rest, stride, padding, dilation, groups, x.dtype, planes)
    return reference.like_planes(y) if planes else y


def _layout_conv(
    x_q: Tensor, weight: Tensor, zero_point: Tensor | None, prepared: weights.Prepared, geometry: _Geometry
) -> Tensor | avx2.PackedWeight:
    """The weight in the form that the kernel for this geometry reads. oneDNN's layout depends on the size of the images
    but not on the batch size; the C kernel's panels depend on neither."""
    shape, stride, padding, dilation, groups = geometry
    out_size = checks.output_size(x_q, weight, stride, padding, dilation)
    multiplications = shape[0] * out_size[0] * out_size[1] * weight.shape[0] * weight.shape[1] * weight.shape[2]
    with_onednn = _onednn_is_right(prepared.length, weight.shape, geometry) and routes.takes_onednn(
        multiplications * prepared.length, prepared, weight
    )
    if not with_onednn and not (groups == 1 and routes.has_avx2()):
        return _float_conv(prepared, weight, zero_point)
    known = list(prepared.forms.items())
    if with_onednn:
        for key, form in known:
            if isinstance(key, _Geometry) and geometry.differs_in_batch_only(key) and _is_onednn(form):
                return form
        w = weights.integers(weight, zero_point, prepared.bits, prepared.length).permute(0, 3, 1, 2)
        batch, high, wide, channels = shape
        return onednn.pack_conv2d(w, list(stride), list(padding), list(dilation), groups, [batch, channels, high, wide])
    image = (shape[1], shape[2], shape[3], *out_size)
    window = (weight.shape[1], weight.shape[2], *stride, *padding, *dilation)
    for _, form in known:
        if isinstance(form, avx2.PackedWeight):
            return form.of_images(image, window)
    return avx2.pack_conv2d(weights.integers(weight, zero_point, prepared.bits, prepared.length), image, window)


def _onednn_is_right(channels: int, weight_shape: torch.Size, geometry: _Geometry) -> bool:
    """Whether oneDNN corrects for the zero point in this convolution. With several input channels per group it always
    does. With one, its AVX-512 kernels do so in depthwise convolutions only, and only where no output pixel's window
    lies entirely in the padding."""
    outputs, high, wide, _ = weight_shape
    inside = geometry.padding[0] < high and geometry.padding[1] < wide
    return channels > 1 or (outputs == geometry.groups > 1 and inside)


def _is_onednn(form: object) -> bool:
    return isinstance(form, Tensor) and form.is_mkldnn


def _prepared(weight: Tensor, zero_point: Tensor | None, bits: int, length: int) -> weights.Prepared:
    known = weights.find(weight, zero_point, bits, length)
    return known or weights.add(weight, zero_point, bits, length)


def linear_weight_only(
    x: Tensor, weight: Tensor, weight_zero_point: Tensor | None, scale: Tensor, bias: Tensor | None,
    weight_bits: int,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::linear_weight_only``: float32 arithmetic, whatever the type of ``x``."""
    checks.linear_weight_only(x, weight, weight_zero_point, scale, bias, weight_bits)
    prepared = _prepared(weight, weight_zero_point, weight_bits, x.shape[-1])
    total = F.linear(x.to(torch.float32), _float_linear(prepared, weight, weight_zero_point))
    return _scaled(total, scale, None, bias, x.dtype)


def conv2d_weight_only(
    x: Tensor, weight: Tensor, weight_zero_point: Tensor | None, scale: Tensor, bias: Tensor | None,
    weight_bits: int, stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::conv2d_weight_only``: float32 arithmetic, whatever the type of ``x``."""
    checks.conv2d_weight_only(x, weight, weight_zero_point, scale, bias, weight_bits, stride, padding, dilation, groups)
    prepared = _prepared(weight, weight_zero_point, weight_bits, x.shape[-1] // groups)
    w = _float_conv(prepared, weight, weight_zero_point)
    total = F.conv2d(x.to(torch.float32).permute(0, 3, 1, 2), w, None, stride, padding, dilation, groups)
    return _scaled(total.permute(0, 2, 3, 1).contiguous(), scale, None, bias, x.dtype)
