"""Layers of the student: fake-quantized on a grid that is set at the start and trained, not recomputed from the weight.

A layer starts with the codes of its plan (whatever the plan's ranges and rounding are) and ends with codes on the
trained grid, which are packed without requantization. So the stored layer is the trained one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layer_plan import LayerPlan, Range
from ..quantize.bos import bos_mask
from ..quantize.config import MixDQFqnConfig, MixDQLayerConfig
from ..quantize.fake import become, straight_through
from ..quantize.grid import SMALLEST_SCALE, Grid, minmax_grid
from ..quantize.planned import quantize_planned
from ..quantize.quantizer import ActQuant, WeightQuant, act_params, fake_quantize_act
from ..quantize.tensor import MixDQTensor, SplitMixDQTensor, bos_row
from .recover_grid import rounded_input, weight_on_grid

NEAR = 0.49
"""Largest initial distance, in grid steps, of a weight from its code's value; below 1/2, so that it rounds to it."""


class Memo:
    """Caches the last result of a function of a tensor that several layers read. Holds only weak references, so a
    result lives as long as a layer keeps it for its backward."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], tuple[Any, ...], weakref.ref[Tensor]] | None = None

    def get(self, x: Tensor, *others: object) -> Tensor | None:
        if self._last is None or self._last[0]() is not x or self._last[1] != self._key(x, others):
            return None
        return self._last[2]()

    def put(self, x: Tensor, result: Tensor, *others: object) -> Tensor:
        self._last = weakref.ref(x), self._key(x, others), weakref.ref(result)
        return result

    @staticmethod
    def _key(x: Tensor, others: tuple[object, ...]) -> tuple[Any, ...]:
        return (0 if x.is_inference() else x._version, torch.is_grad_enabled(), *others)


class Growth(nn.Module):
    """The trainable factors of all scales, or of all ranges, of a student, in one vector, so that the optimizer steps
    one tensor instead of one per layer.

    Attributes:
        logarithms: float32 [n], logarithms of the factors, initially 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logarithms = nn.Parameter(torch.zeros(0, dtype=torch.float32))

    def add(self, count: int) -> slice:
        """Adds ``count`` factors, before training; returns their place."""
        held = len(self.logarithms)
        self.logarithms.data = self.logarithms.new_zeros(held + count)
        return slice(held, held + count)


class InputRange(nn.Module):
    """Rounds the input, of any shape, of all layers that read the same tensor, or the same half of it.

    Attributes:
        growth: the trainable factors of both ends of the range; None if ranges are not trained.
    """

    def __init__(self, ends: Range, bits: int, growth: Growth | None) -> None:
        super().__init__()
        self.bits, self._ends, self.growth = bits, ends, growth
        self._place = slice(0) if growth is None else growth.add(2)
        self._memo = Memo()

    def ends(self) -> Range:
        if self.growth is None:
            return self._ends
        lo, hi = self._grown(self.growth).tolist()
        return lo, hi

    def _grown(self, growth: Growth) -> Tensor:
        stretch = growth.logarithms[self._place].exp()
        return torch.tensor(self._ends, dtype=torch.float32, device=stretch.device) * stretch

    def act(self) -> ActQuant:
        return act_params(*self.ends(), bits=self.bits)

    def forward(self, x: Tensor) -> Tensor:
        version = 0 if self.growth is None else self.growth.logarithms._version
        known = self._memo.get(x, version)
        if known is not None:
            return known
        if self.growth is None:
            rounded = straight_through(x, fake_quantize_act(x, self.act()))
        else:
            rounded = rounded_input(x, self._grown(self.growth), self.bits)
        return self._memo.put(x, rounded, version)


class Student(nn.Module):
    """The rounding of one quantized layer of the student: its grid and the trainable parameters of the grid.

    Attributes:
        scale, zero: float32 [H, N], the initial grid, from the plan's rounding; H is 2 with a split, else 1.
        growth: the trainable factors of the scales; None if scales are not trained.
        bos_output: [N] in the weight's dtype, trained with the weights: the output row of the BOS embedding, without
            bias.
        down, up: [rank, K] and [N, rank]; their product is added to the weight before it is rounded. None without a
            low-rank branch.
        inputs: the InputRange of each half of the input, shared with other layers; empty with 16-bit activations.
    """

    scale: Tensor
    zero: Tensor
    bos_embedding: Tensor | None
    bos_output: nn.Parameter | None
    down: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(
        self,
        layer: LayerPlan,
        quants: list[WeightQuant],
        inputs: list[InputRange],
        growth: Growth | None,
        masks: Memo,
    ) -> None:
        super().__init__()
        self.layer, self.inputs, self._masks = layer, nn.ModuleList(inputs), masks
        self.lowest = self.highest = 0
        self.growth = growth if quants else None
        self.bos_output = self.down = self.up = None
        self.register_buffer("bos_embedding", None, persistent=False)
        if quants:
            scale = torch.stack([q.scale for q in quants])
            zeros = [torch.zeros_like(q.scale) if q.zero_point is None else q.zero_point.float() for q in quants]
            self.register_buffer("scale", scale, persistent=False)
            self.register_buffer("zero", torch.stack(zeros), persistent=False)
            ends = minmax_grid(torch.zeros(1, 1, dtype=torch.float32), layer.weight_bits, bool(layer.symmetric))
            self.lowest, self.highest = ends.lowest, ends.highest
            self._place = slice(0) if growth is None else growth.add(scale.numel())

    def weight(self, weight: Tensor) -> Tensor:
        """The rounded weight; the weight itself at 16 bits."""
        if self.layer.weight_bits == 16:
            return weight
        rounded = [
            weight_on_grid(part.float(), _rows(scale, weight), _rows(zero, weight), self.lowest, self.highest)
            for part, scale, zero in zip(self._parts(weight), self.scales(), self.zero, strict=True)
        ]
        return (rounded[0] if len(rounded) == 1 else torch.cat(rounded, 1)).to(weight.dtype)

    def _parts(self, weight: Tensor) -> list[Tensor]:
        """The weight plus its low-rank product, as one tensor or as the two halves of a split."""
        if self.up is not None and self.down is not None:
            weight = weight + (self.up @ self.down).view(weight.shape).to(weight.dtype)
        return [weight] if self.layer.split is None else list(weight.tensor_split([self.layer.split], 1))

    def scales(self) -> Tensor:
        """float32 [H, N], the current scales."""
        if self.growth is None:
            return self.scale
        factor = self.growth.logarithms[self._place].exp()
        return (self.scale * factor.view(self.scale.shape)).clamp(min=SMALLEST_SCALE)

    def input(self, x: Tensor) -> Tensor:
        """The rounded input; x is [..., K], or [(B,) C, H, W] if the layer has a split."""
        if not len(self.inputs):
            return x
        if self.layer.split is None:
            return self.inputs[0](x)
        halves = x.tensor_split([self.layer.split], x.dim() - 3)
        return torch.cat([ends(half) for ends, half in zip(self.inputs, halves, strict=True)], x.dim() - 3)

    def is_bos(self, x: Tensor) -> Tensor:
        assert self.bos_embedding is not None
        known = self._masks.get(x)
        return self._masks.put(x, bos_mask(x, self.bos_embedding)) if known is None else known

    @torch.no_grad()
    def quants(self, weight: Tensor) -> list[WeightQuant]:
        """The codes of the current weight, for each half."""
        found = []
        for part, scale, zero in zip(self._parts(weight), self.scales(), self.zero, strict=True):
            grid = Grid(scale, zero, self.lowest, self.highest)
            codes = grid.codes(part.float().flatten(1)).view(part.shape)
            eight = self.layer.weight_bits == 8
            kind = torch.int8 if eight else torch.uint8
            found.append(WeightQuant(codes.to(kind), scale.clone(), None if eight else zero.to(torch.int8)))
        return found

    @torch.no_grad()
    def packed(self, weight: Tensor) -> MixDQTensor | SplitMixDQTensor:
        """The current weight in packed integers."""
        bits, dtype = self.layer.weight_bits, weight.dtype
        acts = [cast(InputRange, ends).act() for ends in self.inputs] or [None, None]
        quants = self.quants(weight)
        if self.layer.split is not None:
            halves = [MixDQTensor.from_codes(q, bits, dtype, act=a) for q, a in zip(quants, acts, strict=True)]
            return SplitMixDQTensor(halves[0], halves[1], dtype)
        row = None if self.bos_output is None else self.bos_output.detach().clone()
        return MixDQTensor.from_codes(
            quants[0], bits, dtype, act=acts[0], bos_embedding=self.bos_embedding, bos_output=row
        )

    def plan(self) -> LayerPlan:
        """The layer's plan with the current ranges."""
        ends = [cast(InputRange, i).ends() for i in self.inputs]
        if not ends:
            return self.layer
        return replace(self.layer, act_range=ends[0], split_act_range=ends[1] if len(ends) > 1 else None)


class StudentLinear(nn.Linear):
    """A linear layer whose weight and input are rounded by its ``Student``."""

    quantizer: Student

    def forward(self, input: Tensor) -> Tensor:
        q = self.quantizer
        y = F.linear(q.input(input), q.weight(self.weight), self.bias)
        if q.bos_embedding is None or q.bos_output is None:
            return y
        row = q.bos_output if self.bias is None else q.bos_output + self.bias
        return torch.where(q.is_bos(input), row.to(y.dtype), y)


class StudentConv2d(nn.Conv2d):
    """A convolution whose weight and input are rounded by its ``Student``."""

    quantizer: Student

    def forward(self, input: Tensor) -> Tensor:
        q = self.quantizer
        return self._conv_forward(q.input(input), q.weight(self.weight), self.bias)


def students(model: nn.Module) -> Iterator[tuple[str, StudentLinear | StudentConv2d]]:
    """The student layers of ``model``, by name."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, StudentLinear | StudentConv2d))


@torch.no_grad()
def make_student(model: nn.Module, config: MixDQFqnConfig, *, scales: bool, ranges: bool, rank: int) -> None:
    """Turns the layers of ``model`` that ``config`` (in fake mode, checked) quantizes into student layers, in place.

    Args:
        scales, ranges: whether these are trained. Layers with equal ranges read one tensor and share an InputRange.
        rank: of the low-rank product added to each weight; 0: none.
    """
    parts = _Shared({}, Growth() if scales else None, Growth() if ranges else None, Memo())
    for name, layer_config in config.fqn_to_config.items():
        if isinstance(layer_config, MixDQLayerConfig):
            _convert(model.get_submodule(name), layer_config, parts, rank)


@dataclass(frozen=True, slots=True)
class _Shared:
    """Objects that the layers of one student share."""

    inputs: dict[tuple[object, ...], InputRange]
    scales: Growth | None
    ranges: Growth | None
    masks: Memo

    def inputs_of(self, layer: LayerPlan) -> list[InputRange]:
        found = []
        for ends in (layer.act_range, layer.split_act_range):
            if layer.act_bits < 16 and ends is not None:
                key = ends, layer.act_bits
                if key not in self.inputs:
                    self.inputs[key] = InputRange(ends, layer.act_bits, self.ranges)
                found.append(self.inputs[key])
        return found


def _convert(module: Any, config: MixDQLayerConfig, shared: _Shared, rank: int) -> None:
    layer, weight = config.layer, module.weight
    quants = quantize_planned(weight, layer, config.moment) if layer.weight_bits < 16 else []
    student = Student(layer, quants, shared.inputs_of(layer), shared.scales, shared.masks).to(weight.device)
    if config.bos_embedding is not None:
        embedding = config.bos_embedding.to(weight.device)
        student.bos_embedding, student.bos_output = embedding, nn.Parameter(bos_row(weight, embedding))
    if quants:
        _start_at(weight, quants, student)
        if rank:
            student.down, student.up = _thin(weight, rank)
    become(module, StudentLinear if isinstance(module, nn.Linear) else StudentConv2d)
    module.quantizer = student


def _start_at(weight: Tensor, quants: list[WeightQuant], student: Student) -> None:
    """Moves weights whose planned code is not the nearest one towards that code, until it is the nearest."""
    values = torch.cat([q.dequantize() for q in quants], 1)
    parts = zip(student.scale, student._parts(weight), strict=True)
    steps = torch.cat([_rows(s, weight).expand_as(p) for s, p in parts], 1)
    rest = (weight.float() - values) / steps
    weight.copy_(torch.where(rest.abs() <= NEAR, weight, values + rest.clamp(-NEAR, NEAR) * steps))


def _thin(weight: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """The low-rank factors: random [rank, K] with a standard deviation of rms(weight) / sqrt(rank), and zeros
    [N, rank], so that their product starts at zero."""
    inner, size = weight[0].numel(), weight.float().square().mean().sqrt().item()
    rank = min(rank, inner, len(weight))
    generator = torch.Generator().manual_seed(inner * 1009 + len(weight))
    down = torch.randn(rank, inner, generator=generator, dtype=torch.float32) * (size / rank**0.5)
    up = torch.zeros(len(weight), rank, dtype=torch.float32, device=weight.device)
    return nn.Parameter(down.to(weight.device)), nn.Parameter(up)


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    return x.view(-1, *[1] * (weight.dim() - 1))
