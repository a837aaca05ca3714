"""The torch operators of quantized weights: products, copies, moves and slices."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inductor_kernels import weights
from inductor_kernels.packing import LONGEST_RUN, pack

from ..compat import return_and_correct_aliasing, without_torch_function
from .bos import bos_mask
from .eager import is_eager, reused
from .gradient import differentiable
from .quantizer import quantize_act
from .shared import moved
from .tensor import MixDQTensor, SplitMixDQTensor, _row_sums

aten = torch.ops.aten
kernels = torch.ops.inductor_kernels


def linear(x: Tensor, weight: MixDQTensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the quantized weight [N, K], plus bias; the result has x's type."""
    y = differentiable(partial(_linear, weight), weight.factors, x, bias)
    embedding = weight.bos_embedding
    if weight.bos_output is None or embedding is None:
        return y
    row = weight.bos_output if bias is None else weight.bos_output + bias
    return torch.where(reused(x, embedding, lambda: bos_mask(x, embedding)), row.to(y.dtype), y)


def _linear(weight: MixDQTensor, x: Tensor, bias: Tensor | None) -> Tensor:
    stored, bits = (weight.qdata, weight.weight_zero_point), weight.bits
    act, z = weight.act, weight.act_zero_point
    if act is None:
        return kernels.linear_weight_only(x, *stored, weight.scale, bias, bits)
    if is_eager(x):
        return kernels.quantize_linear(x, *act, *stored, weight.weight_sum, weight.scale, bias, bits)
    codes = quantize_act(x, *act)
    return kernels.linear(codes, *stored, weight.weight_sum, weight.scale, z, bias, None, bits, x.dtype)


def conv2d(
    x: Tensor,
    weight: MixDQTensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """x [B, C, H, W] (or [C, H, W]) convolved with the quantized weight; compiled code computes and returns it
    channels-last."""
    if isinstance(padding, str):
        raise NotImplementedError(f"padding={padding!r} with a quantized weight: give the padding as numbers")
    if x.dim() == 3:
        return conv2d(x.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    return differentiable(partial(_conv2d, weight, geometry), weight.factors, x, bias, geometry)


def _conv2d(weight: MixDQTensor, geometry: tuple[Any, ...], x: Tensor, bias: Tensor | None) -> Tensor:
    stored, bits = (weight.qdata, weight.weight_zero_point), weight.bits
    act, z = weight.act, weight.act_zero_point
    nhwc = x.permute(0, 2, 3, 1)
    if act is None:
        y = kernels.conv2d_weight_only(nhwc, *stored, weight.scale, bias, bits, *geometry)
    elif is_eager(x):
        y = kernels.quantize_conv2d(nhwc, *act, *stored, weight.weight_sum, weight.scale, bias, bits, *geometry)
    else:
        codes = quantize_act(nhwc, *act)
        y = kernels.conv2d(codes, *stored, weight.weight_sum, weight.scale, z, bias, bits, *geometry, x.dtype)
    return y.permute(0, 3, 1, 2)


def split_conv2d(
    x: Tensor, weight: SplitMixDQTensor, bias: Tensor | None = None, *geometry: Any, **kwargs: Any
) -> Tensor:
    """Two convolutions, one for each half of the concatenated channels, summed."""
    channels = x.dim() - 3
    first = x.narrow(channels, 0, weight.split)
    second = x.narrow(channels, weight.split, x.shape[channels] - weight.split)
    return conv2d(first, weight.first, bias, *geometry, **kwargs) + conv2d(
        second, weight.second, None, *geometry, **kwargs
    )


def _pair(value: int | Sequence[int]) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    return pair * 2 if len(pair) == 1 else pair


@MixDQTensor.implements(aten.linear.default)
@MixDQTensor.implements_torch_function(F.linear)
def _(func, types, args, kwargs):
    return linear(*args, **_named(kwargs))


@MixDQTensor.implements(aten.conv2d.default)
@MixDQTensor.implements_torch_function([F.conv2d, torch.conv2d])
def _(func, types, args, kwargs):
    return conv2d(*args, **_named(kwargs))


@SplitMixDQTensor.implements(aten.conv2d.default)
@SplitMixDQTensor.implements_torch_function([F.conv2d, torch.conv2d])
def _(func, types, args, kwargs):
    return split_conv2d(*args, **_named(kwargs))


def _named(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` with torch's name of the first argument, "input", replaced by ours."""
    return {"x" if name == "input" else name: value for name, value in kwargs.items()}


@MixDQTensor.implements_torch_function(Tensor.requires_grad_)
@SplitMixDQTensor.implements_torch_function(Tensor.requires_grad_)
def _(func, types, args, kwargs):
    """Warns and keeps requires_grad False, since integers are not trained, so that ``model.requires_grad_()`` works."""
    weight, *asked = args
    if (*asked, *kwargs.values(), True)[0]:
        warnings.warn(
            "mixdq_ao: quantized weights get no gradient, requires_grad stays False; train adapters, give layers that "
            "are to be trained 16 bits in the plan, or train what the integers are rounded from (recover)",
            stacklevel=2,
        )
    return weight


@MixDQTensor.implements([aten.transpose.int, aten.permute.default])
@SplitMixDQTensor.implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _(func, types, args, kwargs):
    """A packed weight has no transposed form: the result is a plain floating-point tensor of its values."""
    return func(args[0].dequantize(), *args[1:], **kwargs)


def sliced(weight: MixDQTensor, dim: int, start: int, end: int) -> MixDQTensor:
    """Rows (dim 0) or input channels (dim 1) [start, end) of a weight, with their scales."""
    if dim == 0:
        rows: dict[str, Any] = {name: tensor[start:end] for name, tensor in weight.by_row().items()}
        return weight.with_tensors(**rows)
    if weight.bos_embedding is not None:
        raise NotImplementedError(
            f"dividing the input features of {weight}: its BOS row is one sum; divide it by rows (ColwiseParallel)"
        )
    per_byte = 8 // weight.bits
    aligned = LONGEST_RUN * per_byte if weight.bits < 8 else 1  # there runs of packed codes begin, whatever the length
    if start % aligned == 0 and end % aligned == 0 and weight.length % aligned == 0:
        changed = {"qdata": weight.qdata[..., start // per_byte : end // per_byte]}
    else:
        changed = {"qdata": pack(weight.codes()[..., start:end].contiguous(), weight.bits)}
    if weight.weight_sum is not None:
        changed["weight_sum"] = _row_sums(weight.integers()[:, start:end])
    return weight.with_tensors(length=end - start, **changed)


@MixDQTensor.implements(aten.slice.Tensor)
def _(func, types, args, kwargs):
    weight: MixDQTensor = args[0]
    dim, start, end, step = (*args[1:], None, None, None, None)[:4]
    dim = (dim or 0) % weight.dim()
    if (step or 1) != 1 or dim > 1:
        raise NotImplementedError(f"slicing a quantized weight: dimension {dim}, step {step}; expected 0 or 1, step 1")
    start, end, _ = slice(start, end).indices(weight.shape[dim])
    return return_and_correct_aliasing(func, args, kwargs, sliced(weight, dim, start, max(start, end)))


def _parts(weight: MixDQTensor, sizes: int | Sequence[int], dim: int) -> list[MixDQTensor]:
    total, dim = weight.shape[dim], dim % weight.dim()
    if isinstance(sizes, int):
        sizes = [min(sizes, total - i) for i in range(0, total, sizes)]
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [sliced(weight, dim, a, b) for a, b in zip(edges, edges[1:], strict=False)]


@MixDQTensor.implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func, types, args, kwargs):
    call: tuple[Any, ...] = (*args, *kwargs.values(), 0)
    return _parts(*call[:3])


@MixDQTensor.implements(aten.chunk.default)
def _(func, types, args, kwargs):
    """Inference mode does not decompose this operator into splits."""
    call: tuple[Any, ...] = (*args, *kwargs.values(), 0)
    weight, count, dim = call[:3]
    return _parts(weight, -(-weight.shape[dim] // count), dim)


@MixDQTensor.implements_torch_function(torch.cat)
def _(func, types, args, kwargs):
    """Concatenates as ``__torch_dispatch__`` does (``collectives``) and marks the result, by which ``copy_`` recognises
    diffusers' ``fuse_qkv_projections``."""
    with without_torch_function():
        whole = func(*args, **kwargs)
    whole.concatenated = True
    return whole


@MixDQTensor.implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    """Moves every stored tensor to the device; a floating-point type becomes the layer's type, integers stay."""
    weight = args[0]
    device = kwargs.get("device") or weight.device
    dtype = kwargs.get("dtype") or weight.dtype
    if not dtype.is_floating_point:
        raise NotImplementedError(f"a quantized weight cannot become {dtype}; use .integers() for its codes")
    tensors = {
        name: moved(tensor, device, *_beside(weight, name))
        if name in weight.shared_tensors
        else tensor.to(device, non_blocking=kwargs.get("non_blocking", False), copy=True)
        for name, tensor in weight.stored_tensors().items()
    }
    return return_and_correct_aliasing(func, args, kwargs, with_dtype(_held_by(weight, tensors), dtype))


def _beside(weight: MixDQTensor, name: str) -> tuple[Tensor | None, ...]:
    return (weight.act_scale,) if name == "act_zero_point" else ()


@MixDQTensor.implements(aten.copy_.default)
@SplitMixDQTensor.implements(aten.copy_.default)
def _(func, types, args, kwargs):
    """Copies in place from a weight of the same kind, or the dequantized values into a plain tensor."""
    weight, source = args[:2]
    if not isinstance(weight, MixDQTensor | SplitMixDQTensor):
        if getattr(source, "concatenated", False):
            warnings.warn(
                "mixdq_ao: quantized weights were joined and copied into a layer of floating point, which computes in "
                "their place now; pipe.unfuse_qkv_projections() and mixdq_ao.unfuse_projections(model) undo diffusers' "
                "fuse_qkv_projections, and mixdq_ao.fuse_projections(model) joins them as they are",
                stacklevel=5,
            )
        return func(weight, source.dequantize(weight.dtype))
    pairs = list(zip(_halves(weight), _halves(source), strict=True)) if type(weight) is type(source) else []
    if not pairs or not all(_alike(*pair) for pair in pairs):
        raise ValueError(_mismatch(weight, source))
    for pair in pairs:
        _take(*pair)
    return weight


def _halves(weight: MixDQTensor | SplitMixDQTensor) -> list[MixDQTensor]:
    return [weight.first, weight.second] if isinstance(weight, SplitMixDQTensor) else [weight]


def _take(weight: MixDQTensor, source: MixDQTensor) -> None:
    """Copies the tensors of ``source`` into ``weight``. Row sums are computed from the codes where only ``weight``
    holds them."""
    tensors = source.stored_tensors()
    for name, tensor in weight.stored_tensors().items():
        if name in weight.shared_tensors:
            setattr(weight, name, moved(tensors[name], tensor.device, *_beside(source, name)))
            continue
        tensor.copy_(tensors[name] if name in tensors else _row_sums(source.integers()))
        # Below autograd copy_ does not count versions, by which prepared forms of the old weight are dropped.
        torch.autograd.graph.increment_version(tensor)
    if weight.qdata.is_inference():  # inference tensors have no version counter
        weights.clear()
    weight.take_shared_key(source)


def _mismatch(weight: Any, source: Any) -> str:
    given = f"a {source.describe()} one" if hasattr(source, "describe") else f"a plain tensor of {source.dtype}"
    return (
        f"copy_ into a {weight.describe()} weight {list(weight.shape)}: metadata mismatch, the source is {given} "
        f"{list(source.shape)}; load what was quantized alike, or full precision before quantize_"
    )


def _alike(a: MixDQTensor, b: MixDQTensor) -> bool:
    layouts = [{n: t.shape for n, t in w.stored_tensors().items() if n != "weight_sum"} for w in (a, b)]
    return layouts[0] == layouts[1] and (a.bits, a.length, a.act_levels) == (b.bits, b.length, b.act_levels)


@SplitMixDQTensor.implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    first, second = (func(half, **kwargs) for half in (args[0].first, args[0].second))
    return return_and_correct_aliasing(func, args, kwargs, SplitMixDQTensor(first, second, first.dtype))


VIEWS = [aten.detach.default, aten.alias.default]


@MixDQTensor.implements(VIEWS)
@SplitMixDQTensor.implements(VIEWS)
def _(func, types, args, kwargs):
    """torch requires a view to be an inference tensor if and only if its base is one, in every mode."""
    with torch.inference_mode(args[0].is_inference()) if torch.is_inference_mode_enabled() else nullcontext():
        view = args[0]._apply_fn_to_data(lambda tensor: func(tensor, *args[1:], **kwargs))
    return return_and_correct_aliasing(func, args, kwargs, view)


TO = [aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other]


@MixDQTensor.implements(TO)
@SplitMixDQTensor.implements(TO)
def _(func, types, args, kwargs):
    """Inference mode does not decompose these operators into ``_to_copy``."""
    call = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    weight, like = call["self"], call.get("other", call["self"])
    device, dtype = call.get("device") or like.device, call.get("dtype") or like.dtype
    if (device, dtype) == (weight.device, weight.dtype) and not call.get("copy"):
        return weight
    return aten._to_copy.default(weight, device=device, dtype=dtype, non_blocking=call.get("non_blocking", False))


def with_dtype(weight: MixDQTensor, dtype: torch.dtype) -> MixDQTensor:
    """The same weight for layers that compute in ``dtype``; off the CPU with its row sums."""
    tensors = _with_sums(weight) if weight.device.type != "cpu" else weight.stored_tensors()
    if weight.bos_output is not None:
        tensors["bos_output"] = weight.bos_output.to(dtype)
    return _held_by(weight, tensors, dtype)


def _held_by(weight: MixDQTensor, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> MixDQTensor:
    """The same weight holding other tensors of equal values, whose digest ``shared_key`` need not be computed again."""
    attributes = weight.attributes() | {"dtype": dtype or weight.dtype}
    if tensors["qdata"].is_meta:
        attributes["shared_key"] = None
    return MixDQTensor(**tensors, **attributes)  # type: ignore[arg-type]


def _with_sums(weight: MixDQTensor) -> dict[str, Tensor]:
    """The stored tensors plus the row sums that a GPU's products with quantized activations take as an argument."""
    tensors = weight.stored_tensors()
    if weight.act_levels is not None and weight.weight_sum is None:
        tensors["weight_sum"] = _row_sums(weight.integers())
    return tensors


@MixDQTensor.implements(aten.is_pinned.default)
def _(func, types, args, kwargs):
    tensors = args[0].stored_tensors()
    return all(tensors[name].is_pinned() for name in args[0].row_tensors if name in tensors)


@MixDQTensor.implements(aten._pin_memory.default)
def _(func, types, args, kwargs):
    """Pins the stored tensors, except the few bytes that layers share. Row sums are added here, once: offloading with
    streams copies from pinned memory repeatedly."""
    weight: MixDQTensor = args[0]
    tensors = _with_sums(weight)
    pinned = {name: t if name in weight.shared_tensors else t.pin_memory() for name, t in tensors.items()}
    return return_and_correct_aliasing(func, args, kwargs, _held_by(weight, pinned))


@SplitMixDQTensor.implements(aten.is_pinned.default)
def _(func, types, args, kwargs):
    return args[0].first.is_pinned() and args[0].second.is_pinned()


@SplitMixDQTensor.implements(aten._pin_memory.default)
def _(func, types, args, kwargs):
    weight: SplitMixDQTensor = args[0]
    pinned = SplitMixDQTensor(weight.first.pin_memory(), weight.second.pin_memory(), weight.dtype)
    return return_and_correct_aliasing(func, args, kwargs, pinned)


@MixDQTensor.implements(aten.record_stream.default)
@SplitMixDQTensor.implements(aten.record_stream.default)
def _(func, types, args, kwargs):
    for tensor in args[0].stored_tensors().values():
        func(tensor, *args[1:], **kwargs)
