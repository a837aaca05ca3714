"""The operators on a CPU: oneDNN's int8 kernels where they are exact, slower exact ones where they are not.

Without VNNI or AMX, oneDNN multiplies with ``vpmaddubsw``, which adds two products in 16 bits and *saturates*:
8-bit codes times 8-bit weights come out 13-22 % wrong. The route is therefore chosen per weight:

    onednn-int8   VNNI or AMX, or weights so small that a pair of products fits 16 bits (all 2 and 4 bit ones)
    avx2          everything else, and products too small to repay oneDNN's cost per call: a C kernel that multiplies
                  16-bit pairs, built once where there is a compiler (:mod:`inductor_kernels.avx2`)
    float32       the same on integer codes, where there is none; also grouped convolutions

Measured on two cores of an AMD EPYC, times the speed of float32. Zen 3, no VNNI: linear layers of 10 M multiplications
and more 1.4-2.0 (avx2) and 1.1-2.6 (onednn-int8), 3x3 convolutions 1.1-1.9 and 1.3-1.8. Zen 5, VNNI with AVX-512
(onednn-int8): linear layers 6.1-8.2, twice what it would be if MKL did not multiply float32 with AVX2 on such a
processor; 3x3 convolutions 3.1-4.3; 1.6-1.8 tera-operations a second.

Prepared weights are cached beside the graph (:mod:`inductor_kernels.weights`).
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from . import avx2, checks, reference, weights

SMALL = 1 << 21  # products of fewer multiplications run in float32: oneDNN's int8 call costs 50 us before it starts
SMALL_VNNI = 1 << 19  # 20 us there, and the product itself next to nothing
SMALL_AVX2 = 1 << 26  # below, the C kernel is the faster one also where oneDNN is exact
CODES = (torch.uint8, torch.int8)
POST_OPS = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


def weight_cache(mode: str) -> None:
    """ "speed" keeps the prepared form of every weight; "memory" unpacks at each call and keeps nothing."""
    weights.set_mode(mode)


@functools.cache
def int8_is_exact() -> bool:
    """Whether oneDNN's int8 product is exact for all codes on this machine: the flags say so and a trial agrees."""
    if not torch.backends.mkldnn.is_available():
        return False
    flags = (getattr(torch.cpu, name, None) for name in ("_is_vnni_supported", "_is_amx_tile_supported"))
    if not any(flag is not None and flag() for flag in flags):
        return False
    x = torch.full((64, 128), 255, dtype=torch.uint8)
    w = torch.full((64, 128), 127, dtype=torch.int8)
    y = _onednn_linear(x, 0, torch.ops.onednn.qlinear_prepack(w, None), torch.ones(64), None)
    return bool((y == 255 * 127 * 128).all())


@functools.cache
def _avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def route(weight_bits: int, weight: Tensor | None = None) -> str:
    """Which kernel multiplies large products by such weights here: "onednn-int8", "avx2" or "float32".

    weight: an int8 weight, to say it for this one; without it the answer for 8 bit is that of a typical weight.
    """
    if weight_bits not in (2, 4, 8):
        raise ValueError(f"weight_bits={weight_bits!r}: expected 2, 4 or 8")
    onednn = torch.backends.mkldnn.is_available()
    if onednn and (weight_bits < 8 or int8_is_exact() or (weight is not None and _pairs_fit(weight))):
        return "onednn-int8"
    return "avx2" if _has_avx2() else "float32"


@functools.cache
def _has_avx2() -> bool:
    """Whether the C kernel may multiply; where oneDNN is exact that is the faster one."""
    return not int8_is_exact() and avx2.available()


def _small() -> int:
    """Multiplications below which a product is not worth oneDNN's call."""
    if int8_is_exact():
        return SMALL_VNNI
    return SMALL_AVX2 if _has_avx2() else SMALL


def _pairs_fit(w: Tensor) -> bool:
    """Whether 255 times any two weights added up in 16 bits stays in range, so that nothing can saturate.

    A linear layer adds neighbours along K; how a convolution pairs its taps is oneDNN's business, so there the two
    largest weights of a channel must fit.
    """
    rows = w.flatten(1).to(torch.int32)
    if rows.shape[1] % 2:
        rows = F.pad(rows, (0, 1))
    for signed in (rows.clamp(min=0), (-rows).clamp(min=0)):
        pairs = signed.unflatten(1, (-1, 2)) if w.ndim == 2 else signed.topk(min(2, signed.shape[1]), 1).values
        if int(pairs.sum(-1).max()) * 255 > 32767:
            return False
    return True


def _takes_int8(prepared: weights.Prepared, weight: Tensor) -> bool:
    if prepared.exact is None:
        packed = prepared.bits < 8
        look = not packed and not int8_is_exact() and weights.keeps()  # a look costs more than it saves if not kept
        prepared.exact = route(prepared.bits, weight if look else None) == "onednn-int8"
    return prepared.exact


def _unsigned(x_q: Tensor) -> Tensor:
    return x_q if x_q.dtype == torch.uint8 else x_q.view(torch.uint8) ^ 128


def _centered(x_q: Tensor, zero_point: int) -> Tensor:
    x = x_q.to(torch.float32)
    zero_point -= 128 if x_q.dtype == torch.int8 else 0
    return x.add_(float(-zero_point)) if zero_point else x  # half the cost of sub_ on a small tensor


def _scaled(total: Tensor, scale: Tensor, row_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scales and bias, in place on a float32 result the caller owns."""
    if row_scale is not None:
        total.mul_(row_scale.unsqueeze(-1))
    if bias is None:
        total.mul_(scale)
    else:
        torch.addcmul(bias.float(), total, scale, out=total)
    return total if dtype == torch.float32 else total.to(dtype)


def _float(bias: Tensor | None) -> Tensor | None:
    """oneDNN adds a bias of 16 bits to its int8 products by a reference path that is thousands of times slower."""
    return None if bias is None else bias.float()


def _packed_linear(prepared: weights.Prepared, weight: Tensor, zero_point: Tensor | None) -> Tensor:
    packed = prepared.forms.get("onednn")
    if packed is None:
        w = weights.integers(weight, zero_point, prepared.bits, prepared.length)
        packed = prepared.keep("onednn", torch.ops.onednn.qlinear_prepack(w, None))
    return packed


def _onednn_linear(
    x: Tensor, zero_point: int, packed: Tensor, scale: Tensor, bias: Tensor | None, out_scale=1.0, out_zero_point=0,
    dtype=torch.float32, activation="none",
) -> Tensor:  # fmt: skip
    return torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, zero_point, packed, scale, _zeros(scale.shape[0]), _float(bias), out_scale, out_zero_point, dtype,
        POST_OPS[activation][0], [], POST_OPS[activation][1],
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def _plain(x_q: Tensor, scale: Tensor, bias: Tensor | None, n: int) -> bool:
    """The checks that a known weight leaves open, cheaply; when they fail the full ones name the mistake."""
    good = scale.dtype is torch.float32 and scale.numel() == n and x_q.dtype in CODES
    return good and (bias is None or bias.numel() == n)


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
    if x_q.numel() * n < _small() or not _takes_int8(prepared, weight):
        if _has_avx2():
            plan = prepared.forms.get("avx2")
            if plan is None:
                w = weights.integers(weight, weight_zero_point, weight_bits, k)
                plan = prepared.keep("avx2", avx2.linear_plan(w))
            y = avx2.product(plan, x_q, scale, z, bias, row_scale, (*x_q.shape[:-1], n))
            return y if out_dtype is torch.float32 else y.to(out_dtype)
        total = F.linear(_centered(x_q, z), _float_linear(prepared, weight, weight_zero_point))
        return _scaled(total, scale, row_scale, bias, out_dtype)
    packed = _packed_linear(prepared, weight, weight_zero_point)
    x = _unsigned(x_q.contiguous())
    direct = writes(out_dtype)
    if row_scale is None:
        y = _onednn_linear(x, z, packed, scale, bias, dtype=out_dtype if direct else torch.float32)
        return y if direct else y.to(out_dtype)
    total = _onednn_linear(x, z, packed, scale, None).mul_(row_scale.unsqueeze(-1))
    return (total if bias is None else total.add_(bias)).to(out_dtype)


linear_glu = reference.linear_glu  # graphs for a CPU do not get it


def linear_post(
    x_q: Tensor, weight: Tensor, weight_zero_point: Tensor | None, weight_sum: Tensor | None, scale: Tensor,
    zero_point: Tensor, bias: Tensor | None, row_scale: Tensor | None, weight_bits: int, out_dtype: torch.dtype,
    other: Tensor | None, activation: str, out_inv_scale: Tensor | None, out_zero_point: Tensor | None,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::linear_post``: oneDNN does it where it multiplies; for a sum the bits are those of adding
    afterwards."""
    n, k = weight.shape[0], x_q.shape[-1] if x_q.ndim else 0
    product = (x_q, weight, weight_zero_point, weight_sum, scale, zero_point, bias, row_scale, weight_bits)
    post = (other, activation, out_inv_scale, out_zero_point)
    prepared = weights.find(weight, weight_zero_point, weight_bits, k)
    if prepared is None or not _plain(x_q, scale, bias, n):
        checks.linear(*product, out_dtype)
    checks.post(x_q, weight, out_dtype, *post)
    alone = other is None or (activation == "none" and out_inv_scale is None and writes(out_dtype))
    multiplications = x_q.numel() * n
    if (
        row_scale is not None
        or not alone
        or not 0 < multiplications >= _small()
        or not _takes_int8(prepared := prepared or weights.add(weight, weight_zero_point, weight_bits, k), weight)
    ):
        return reference.post(linear(*product, torch.float32), out_dtype, *post)
    x, z = _unsigned(x_q.contiguous()), int(zero_point)
    packed = _packed_linear(prepared, weight, weight_zero_point)
    if other is not None:
        return torch.ops.onednn.qlinear_pointwise.binary(
            x, 1.0, z, packed, scale, _zeros(n), other.contiguous(), _float(bias), 1.0, 0, out_dtype, 1.0, 0,
            "add", 1.0, "none", [], "",
        )  # fmt: skip
    if out_inv_scale is not None and out_zero_point is not None:
        into = 1 / float(out_inv_scale), int(out_zero_point), torch.uint8
    else:
        into = 1.0, 0, out_dtype if writes(out_dtype) else torch.float32
    y = _onednn_linear(x, z, packed, scale, bias, *into, activation)
    return y if y.dtype in (out_dtype, torch.uint8) else y.to(out_dtype)


def writes(out_dtype: torch.dtype) -> bool:
    """Whether oneDNN's int8 products write this type themselves: bfloat16 from AVX-512 on; below, a 100x slower kernel
    is taken."""
    return out_dtype is torch.float32 or (out_dtype is torch.bfloat16 and _avx512())


def repays_activation(name: str) -> bool:
    """Whether oneDNN computes this function no slower than generated code. Its tanh comes from tables, which AVX-512
    holds in registers; AVX2 gathers them from memory: 5.4 ns per element on an EPYC (Zen 3), where generated code takes
    3.1, or 1.1 as :mod:`inductor_kernels.gelu` writes it. On a Zen 5 linear, tanh GELU, quantize, linear is 1.01-1.09
    times as fast by oneDNN."""
    return name != "gelu_tanh" or _avx512()


def repays_onednn(multiplications: int, weight_bits: int) -> bool:
    """Whether products of this size run in oneDNN's int8 kernels here, whatever the weight's values."""
    return multiplications >= _small() and route(weight_bits) == "onednn-int8"


def quantize_linear(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int, weight: Tensor, weight_zero_point: Tensor | None,
    weight_sum: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::quantize_linear``: the C kernel quantizes rows as it reads them."""
    n, k = weight.shape[0], x.shape[-1] if x.ndim else 0
    if x.dtype is torch.float32 and _has_avx2() and (bias is None or bias.numel() == n) and scale.numel() == n:
        prepared = weights.find(weight, weight_zero_point, weight_bits, k)
        plan = None if prepared is None else prepared.forms.get("avx2")
        if (
            prepared is not None
            and plan is not None
            and (x.numel() * n < _small() or not _takes_int8(prepared, weight))
        ):
            z, shape = int(zero_point), (*x.shape[:-1], n)
            return avx2.product(plan, x, scale, z, bias, None, shape, float(inv_scale), levels)
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
    """``planes``: the result's memory is that of [B, O, OH, OW] where the C kernel serves; else what costs nothing."""
    length = x_q.shape[-1] // groups if groups > 0 else 0
    prepared = weights.find(weight, weight_zero_point, weight_bits, length)
    n = weight.shape[0]
    geometry = (x_q.shape, *stride, *padding, *dilation, groups)
    packed = None if prepared is None else prepared.forms.get(geometry)
    z = int(zero_point)
    if packed is None or not _plain(x_q, scale, bias, n):
        arguments = (x_q, weight, weight_zero_point, weight_sum, scale, zero_point, bias, weight_bits)
        checks.conv2d(*arguments, stride, padding, dilation, groups, out_dtype)
        if x_q.numel() == 0 or weight.numel() == 0:
            return reference.conv2d(*arguments, stride, padding, dilation, groups, out_dtype)
        prepared = prepared or weights.add(weight, weight_zero_point, weight_bits, length)
        packed = _layout_conv(x_q, z, weight, weight_zero_point, prepared, geometry)
        prepared.keep(geometry, packed)
    if isinstance(packed, avx2.Plan):
        size = (packed.layout.out_h, packed.layout.out_w)
        y = avx2.product(packed, x_q, scale, z, bias, None, (x_q.shape[0], *size, n), planes=planes)
        return y if out_dtype is torch.float32 else y.to(out_dtype)
    if not packed.is_mkldnn:  # the float32 form
        x = _centered(x_q, z).permute(0, 3, 1, 2)
        total = F.conv2d(x, packed, None, stride, padding, dilation, groups)
        return _scaled(total.permute(0, 2, 3, 1).contiguous(), scale, None, bias, out_dtype)
    direct = writes(out_dtype)
    y = torch.ops.onednn.qconv_pointwise.default(
        _unsigned(x_q.contiguous()).permute(0, 3, 1, 2), 1.0, z, packed, scale, _zeros(n), _float(bias),
        stride, padding, dilation, groups, 1.0, 0, out_dtype if direct else torch.float32, "none", [], "",
    )  # fmt: skip
    return (y if direct else y.to(out_dtype)).permute(0, 2, 3, 1).contiguous()


def quantize_conv2d(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int, weight: Tensor, weight_zero_point: Tensor | None,
    weight_sum: Tensor | None, scale: Tensor, bias: Tensor | None, weight_bits: int, stride: list[int],
    padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::quantize_conv2d``: the result lies in memory as ``x`` does."""
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
    x_q: Tensor, z: int, weight: Tensor, zero_point: Tensor | None, prepared: weights.Prepared, geometry
) -> Tensor | avx2.Plan:
    """The weight as the route of this geometry wants it; oneDNN's layout needs the input's shape and zero point."""
    shape, sh, sw, ph, pw, dh, dw, groups = geometry
    height, width = checks.output_size(x_q, weight, (sh, sw), (ph, pw), (dh, dw))
    multiplications = shape[0] * height * width * weight.shape[0] * weight.shape[1] * weight.shape[2]
    if multiplications * prepared.length < _small() or not _takes_int8(prepared, weight):
        if groups == 1 and _has_avx2():
            w = weights.integers(weight, zero_point, prepared.bits, prepared.length)
            image = (shape[1], shape[2], shape[3], height, width)
            return avx2.conv_plan(w, image, (weight.shape[1], weight.shape[2], sh, sw, ph, pw, dh, dw))
        return _float_conv(prepared, weight, zero_point)
    w = weights.integers(weight, zero_point, prepared.bits, prepared.length).permute(0, 3, 1, 2)
    batch, high, wide, channels = shape
    return torch.ops.onednn.qconv_prepack(
        w, torch.ones(w.shape[0]), 1.0, max(z, 1), [sh, sw], [ph, pw], [dh, dw], groups, [batch, channels, high, wide]
    )


def _forms(weight: Tensor, zero_point: Tensor | None, bits: int, length: int) -> weights.Prepared:
    known = weights.find(weight, zero_point, bits, length)
    return known or weights.add(weight, zero_point, bits, length)


def linear_weight_only(
    x: Tensor, weight: Tensor, weight_zero_point: Tensor | None, scale: Tensor, bias: Tensor | None,
    weight_bits: int,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::linear_weight_only``: float32 arithmetic, whatever the type of ``x``."""
    checks.linear_weight_only(x, weight, weight_zero_point, scale, bias, weight_bits)
    prepared = _forms(weight, weight_zero_point, weight_bits, x.shape[-1])
    total = F.linear(x.to(torch.float32), _float_linear(prepared, weight, weight_zero_point))
    return _scaled(total, scale, None, bias, x.dtype)


def conv2d_weight_only(
    x: Tensor, weight: Tensor, weight_zero_point: Tensor | None, scale: Tensor, bias: Tensor | None,
    weight_bits: int, stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """``inductor_kernels::conv2d_weight_only``: float32 arithmetic, whatever the type of ``x``."""
    checks.conv2d_weight_only(x, weight, weight_zero_point, scale, bias, weight_bits, stride, padding, dilation, groups)
    prepared = _forms(weight, weight_zero_point, weight_bits, x.shape[-1] // groups)
    w = _float_conv(prepared, weight, weight_zero_point)
    total = F.conv2d(x.to(torch.float32).permute(0, 3, 1, 2), w, None, stride, padding, dilation, groups)
    return _scaled(total.permute(0, 2, 3, 1).contiguous(), scale, None, bias, x.dtype)
