"""A linear or convolution layer that stores its weight once and runs at several precisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inductor_kernels.packing import pack, unpack_weight

from ..layer_plan import LayerPlan
from ..quantize.bos import bos_mask
from ..quantize.gradient import differentiable
from ..quantize.quantizer import ActQuant, act_bits, act_params, quantize_act, quantize_weight, scaled
from ..quantize.tensor import bos_row
from . import nested, nested_op

Storage = Literal["nested", "own"]


class Switch:
    """The level that a model runs at; one object, shared by all its layers."""

    def __init__(self, level: str) -> None:
        self.level = level


@dataclass(frozen=True, slots=True)
class Form:
    """How a layer runs at a level.

    Attributes:
        bits: of the weight.
        levels: largest activation code; None for 16-bit activations.
        bos: whether BOS rows are replaced by their full-precision output.
        row: index into the per-form buffers of ``LevelWeight``.
    """

    bits: int
    levels: int | None
    bos: bool
    row: int


class LevelWeight(nn.Module):
    """One weight, or one half of a split weight, with the parameters of every form.

    Buffers:
        planes: with nested storage; with storage "own" ``codes_8``, ``codes_4`` and ``codes_2``, packed.
        zero_4, zero_2: int8 [N], zero points of the weight.
        scale: float32 [forms, N], weight scale times activation scale.
        inverse: float32 [forms], 1 / activation scale.
        zero_point: int32 [forms], of the activation.
        sums: int32 [forms, N], sums of the integer weights over the inputs; only on devices whose kernels take them
            (not on a CPU).
    """

    EXACT = ("scale", "inverse")
    scale: Tensor
    inverse: Tensor
    zero_point: Tensor
    sums: Tensor | None

    def __init__(self, weight: Tensor, forms: Sequence[tuple[LayerPlan, ActQuant | None]], storage: Storage) -> None:
        super().__init__()
        self.length, self.storage = weight.shape[1], storage
        self.bits = tuple(layer.weight_bits for layer, _ in forms)
        scales = self._nest(weight) if storage == "nested" else self._own(weight, forms)
        acts = [act or ActQuant(1.0, 1.0, 0, 0) for _, act in forms]
        device = weight.device
        rows = [scales[bits] * act.scale for bits, act in zip(self.bits, acts, strict=True)]
        self.register_buffer("scale", torch.stack(rows))
        self.register_buffer("inverse", torch.tensor([a.inv_scale for a in acts], dtype=torch.float32, device=device))
        self.register_buffer("zero_point", torch.tensor([a.zero_point for a in acts], dtype=torch.int32, device=device))
        self.register_buffer("sums", None, persistent=False)
        self._add_sums()

    def _nest(self, weight: Tensor) -> dict[int, Tensor]:
        quant = nested.nest(weight)
        self.register_buffer("planes", quant.planes)
        self.register_buffer("zero_4", quant.zero_point if 4 in self.bits else None)
        return quant.scale

    def _own(self, weight: Tensor, forms: Sequence[tuple[LayerPlan, ActQuant | None]]) -> dict[int, Tensor]:
        """Codes of each width, quantized separately; the same codes as in a ``MixDQTensor``."""
        scales, planned = {}, {layer.weight_bits: layer for layer, _ in forms}
        for bits, layer in sorted(planned.items(), reverse=True):
            quant = quantize_weight(weight, bits, symmetric=layer.symmetric, weight_range=layer.weight_range)
            codes = quant.codes.movedim(1, -1).contiguous()
            self.register_buffer(f"codes_{bits}", codes if bits == 8 else pack(codes, bits))
            self.register_buffer(f"zero_{bits}", quant.zero_point)
            scales[bits] = quant.scale
        return scales

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LevelWeight:
        """Moves every buffer to another device, but keeps scales in float32 if the floating-point dtype changes."""
        for name in self.EXACT:
            self._buffers[name] = self.get_buffer(name).view(torch.int32)
        try:
            super()._apply(fn, recurse)
        finally:
            for name in self.EXACT:
                self._buffers[name] = self.get_buffer(name).view(torch.float32)
        self._add_sums()
        return self

    def _add_sums(self) -> None:
        if self.scale.device.type not in ("cpu", "meta") and self._buffers["sums"] is None:
            self.sums = torch.stack([self.integers(bits).flatten(1).sum(1, dtype=torch.int32) for bits in self.bits])

    def _stored(self, bits: int) -> Tensor:
        """Packed codes in the kernels' layout; both planes for a nested weight at 8 bits."""
        if self.storage == "own":
            return self.get_buffer(f"codes_{bits}")
        planes = self.get_buffer("planes")
        return planes[0] if bits == 4 else planes

    def _zero(self, bits: int) -> Tensor | None:
        return None if bits == 8 else self._buffers[f"zero_{bits}"]

    def integers(self, bits: int) -> Tensor:
        """int8 [N, ..., K], the weight's integers with the zero point subtracted."""
        if self.storage == "nested" and bits == 8:
            return nested.merged(self._stored(8), self.length)
        return unpack_weight(self._stored(bits), self._zero(bits), bits, self.length)

    def factors(self, form: Form) -> tuple[Tensor, Tensor]:
        """The weight as int8 integers in its logical shape, [N, K] or [O, C / groups, kh, kw], and its scale [N]."""
        scale = self.scale[form.row]
        if form.levels is not None:
            scale = scale * self.inverse[form.row]
        return self.integers(form.bits).movedim(-1, 1), scale

    def dequantize(self, form: Form, dtype: torch.dtype) -> Tensor:
        """The weight in floating point, in its logical shape."""
        return scaled(*self.factors(form)).to(dtype)

    def product(self, x: Tensor, form: Form, bias: Tensor | None, geometry: list[int]) -> Tensor:
        """x times the weight, in the dtype of x; x is [..., K], or [B, C, H, W] for a convolution (``geometry``)."""
        product, factors = partial(self._product, form, geometry), partial(self.factors, form)
        return differentiable(product, factors, x, bias, nested_op.window(geometry))

    def _product(self, form: Form, geometry: list[int], x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.permute(0, 2, 3, 1) if geometry else x
        y = self._product_of_rows(form, geometry, x, bias)
        return y.permute(0, 3, 1, 2) if geometry else y

    def _product_of_rows(self, form: Form, geometry: list[int], x: Tensor, bias: Tensor | None) -> Tensor:
        """The product for x [..., K] or NHWC."""
        bits, row, zero_point = form.bits, form.row, None
        scale, sums = self.scale[row], self.sums
        codes = x
        if form.levels is not None:
            zero_point = self.zero_point[row]
            codes = quantize_act(x, self.inverse[row], zero_point, form.levels)
        stored, zero, total = self._stored(bits), self._zero(bits), None if sums is None else sums[row]
        if self.storage == "nested" and bits == 8:
            if x.device.type == "cpu":
                return torch.ops.mixdq_ao.nested_product(
                    codes, stored, total, scale, zero_point, bias, self.length, geometry, x.dtype
                )
            stored = nested.merged(stored, self.length)
        return nested_op.product(codes, stored, zero, total, scale, zero_point, bias, bits, geometry, x.dtype)


class LevelLayer(nn.Module):
    """Replaces an nn.Linear or nn.Conv2d: called in the same way, runs at the precision of the switch's level.

    Attributes:
        forms: {level: Form, or None where the layer runs with its own weight ``full``}.
        weights: one LevelWeight, or two for a concatenated input (``split`` channels in the first).
        kind: an empty tensor that follows the layer through ``.to``; its dtype is that of the weight.
    """

    switched: ClassVar[bool] = True  # for layers.prepared_advice
    bos_embedding: Tensor | None
    bos_output: Tensor | None
    kind: Tensor

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        plans: Mapping[str, LayerPlan | None],
        switch: Switch,
        *,
        bos_embedding: Tensor | None,
        storage: Storage,
    ) -> None:
        """``plans``: how the layer runs at each level; None for its own, unquantized weight. Weight bits are 8, 4 or 2
        (nested storage runs 2 as 4)."""
        super().__init__()
        for name in layer.__constants__:  # attributes that models and pipelines read: in_features, kernel_size, ...
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        weight, self.bias, self.switch = layer.weight.detach(), layer.bias, switch
        plans = {n: p and _stored_plan(p, storage) for n, p in plans.items()}
        quantized = [p for p in plans.values() if p is not None]
        self.split = next((p.split for p in quantized if p.split is not None), None)
        distinct = list(dict.fromkeys(quantized))
        rows = {p: i for i, p in enumerate(distinct)}
        self.forms = {n: None if p is None else Form(*_widths(p), p.bos, rows[p]) for n, p in plans.items()}
        halves = [weight] if self.split is None else list(weight.tensor_split([self.split], 1))
        self.weights = nn.ModuleList(
            LevelWeight(half, [(p, _act(p, i)) for p in distinct], storage) for i, half in enumerate(halves)
        )
        self.geometry: list[int] = []
        if isinstance(layer, nn.Conv2d):
            self.geometry = [*layer.stride, *layer.padding, *layer.dilation, layer.groups]  # type: ignore[list-item]
        keeps = None in plans.values()
        self.full = nn.Parameter(weight, requires_grad=False) if keeps else None
        self.register_buffer("kind", weight.new_empty(0), persistent=False)
        bos = any(p.bos for p in quantized)
        self.register_buffer("bos_embedding", bos_embedding if bos else None, persistent=False)
        row = bos_row(weight, bos_embedding) if bos and bos_embedding is not None else None
        self.register_buffer("bos_output", row if row is None or layer.bias is None else row + layer.bias.detach())

    @property
    def level(self) -> str:
        return self.switch.level

    def forward(self, input: Tensor) -> Tensor:
        form = self.forms[self.level]
        if self.geometry:
            return self._convolved(input, form)
        if form is None:
            return F.linear(input, self.full, self.bias)  # type: ignore[arg-type]
        y = self.weights[0].product(input, form, self.bias, self.geometry)  # type: ignore[operator]
        if not form.bos or self.bos_embedding is None or self.bos_output is None:
            return y
        return torch.where(bos_mask(input, self.bos_embedding), self.bos_output.to(y.dtype), y)

    def _convolved(self, x: Tensor, form: Form | None) -> Tensor:
        g = self.geometry
        if form is None:
            return F.conv2d(x, self.full, self.bias, g[:2], g[2:4], g[4:6], g[6])  # type: ignore[arg-type]
        if x.dim() == 3:
            return self._convolved(x.unsqueeze(0), form).squeeze(0)
        halves = [x] if self.split is None else x.tensor_split([self.split], 1)
        parts = [
            weight.product(half, form, None if i else self.bias, g)  # type: ignore[operator]
            for i, (half, weight) in enumerate(zip(halves, self.weights, strict=True))
        ]
        return parts[0] if self.split is None else parts[0] + parts[1]

    @property
    def weight(self) -> Tensor:
        """The weight at the current level, dequantized at each access (models read its dtype)."""
        form = self.forms[self.level]
        if form is None:
            return self.full  # type: ignore[return-value]
        return torch.cat([w.dequantize(form, self.kind.dtype) for w in self.weights], 1)  # type: ignore[operator]

    def extra_repr(self) -> str:
        names = {n: "full" if f is None else f"W{f.bits}A{act_bits(f.levels)}" for n, f in self.forms.items()}
        return ", ".join(f"{n}: {v}" for n, v in names.items())


def _stored_plan(plan: LayerPlan, storage: Storage) -> LayerPlan:
    """Nested storage has no 2-bit weights: it runs them at 4 bits, which read the same plane."""
    return replace(plan, weight_bits=4) if storage == "nested" and plan.weight_bits == 2 else plan


def _widths(plan: LayerPlan) -> tuple[int, int | None]:
    return plan.weight_bits, None if plan.act_bits == 16 else 2**plan.act_bits - 1


def _act(plan: LayerPlan, half: int) -> ActQuant | None:
    """Quantization parameters of the input, or of one half of a split input."""
    if plan.act_bits == 16:
        return None
    limits = plan.split_act_range if half else plan.act_range
    assert limits is not None
    return act_params(*limits, bits=plan.act_bits)
