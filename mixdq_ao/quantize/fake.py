"""Fake mode: the rounding of real mode in floating point, differentiable by a straight-through estimator."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import QuantizationError
from ..layer_plan import LayerPlan
from ..mixin import mix_in, restore
from .bos import bos_mask
from .planned import quantize_planned
from .quantizer import ActQuant, WeightQuant, act_bits, fake_quantize_act
from .tensor import bos_row


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of ``rounded``, to the bit where ``x`` is finite, with the gradient of ``x`` (Bengio et al. 2013, arXiv
    1308.3432). The usual x + (rounded - x) would give another value in 16-bit arithmetic."""
    return rounded.detach() + (x - x.detach())


def rounded_weight(weight: Tensor, layer: LayerPlan, moment: Tensor | None) -> Tensor:
    """``weight`` quantized and dequantized as ``layer`` says, in its shape and type."""
    return values_of(quantize_planned(weight, layer, moment), weight.dtype)


def values_of(quants: list[WeightQuant], dtype: torch.dtype) -> Tensor:
    """The dequantized values of a weight, or of its two halves concatenated."""
    return torch.cat([q.dequantize() for q in quants], 1).to(dtype)


@torch.library.custom_op("mixdq_ao::searched_weight", mutates_args=())
def searched_weight(
    weight: Tensor,
    moment: Tensor | None,
    bits: int,
    symmetric: bool,
    split: int | None,
    weight_range: str,
    rounding: str,
) -> Tensor:
    """``rounded_weight`` as one operator, which keeps its loops over columns and candidate ranges out of graphs."""
    how: dict[str, Any] = {"symmetric": symmetric, "split": split, "weight_range": weight_range, "rounding": rounding}
    return rounded_weight(weight, LayerPlan(weight_bits=bits, **how), moment)


@searched_weight.register_fake
def _(weight: Tensor, *others: object) -> Tensor:
    return torch.empty_like(weight)


class FakeQuantizer(nn.Module):
    """Rounds the weight and the input of one layer; has no parameters.

    Attributes:
        layer: bits and rounding; a 16-bit weight is not rounded.
        acts: activation parameters of each half of the input (one entry without a split; empty: 16 bits).
        moment: second moment of the input [K, K], where the layer's rounding needs it.
        kept: the codes of ``keep``, None before.
    """

    bos_embedding: Tensor | None
    moment: Tensor | None
    bos_output: Tensor | None

    def __init__(
        self,
        layer: LayerPlan,
        acts: tuple[ActQuant, ...],
        bos_embedding: Tensor | None,
        moment: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.acts = layer, acts
        self.register_buffer("bos_embedding", bos_embedding, persistent=False)
        self.register_buffer("moment", moment if layer.needs_moment else None, persistent=False)
        self.register_buffer("bos_output", None, persistent=False)
        self.kept: list[WeightQuant] | None = None

    @property
    def split(self) -> int | None:
        return self.layer.split

    def keep(self, weight: Tensor) -> None:
        """Rounds ``weight``, which must not change afterwards, once for all later calls. Keeps its codes (a byte each)
        and the output for the BOS row."""
        if self.bos_embedding is not None and self.bos_output is None:
            self.bos_output = bos_row(weight, self.bos_embedding)
        if self.layer.weight_bits < 16 and self.kept is None:
            self.kept, self.moment = quantize_planned(weight.detach(), self.layer, self.moment), None

    def weight(self, weight: Tensor) -> Tensor:
        if self.layer.weight_bits == 16:
            return weight
        rounded = self._rounded(weight) if self.kept is None else values_of(self.kept, weight.dtype)
        return straight_through(weight, rounded)

    def _rounded(self, weight: Tensor) -> Tensor:
        layer = self.layer
        if layer.weight_range == "minmax" and layer.rounding == "nearest":
            return rounded_weight(weight, layer, None)
        bits, symmetric = layer.weight_bits, bool(layer.symmetric)
        rounding = layer.split, layer.weight_range, layer.rounding
        return searched_weight(weight.detach(), self.moment, bits, symmetric, *rounding)

    def input(self, x: Tensor) -> Tensor:
        """Rounds the input ``x``: [..., K], or [(B,) C, H, W] where the layer has a split."""
        if not self.acts:
            return x
        if self.split is None:
            return straight_through(x, fake_quantize_act(x, self.acts[0]))
        halves = x.tensor_split([self.split], x.dim() - 3)
        rounded = [fake_quantize_act(h, act) for h, act in zip(halves, self.acts, strict=True)]
        return straight_through(x, torch.cat(rounded, x.dim() - 3))

    def extra_repr(self) -> str:
        act = act_bits(self.acts[0].levels if self.acts else None)
        return f"W{self.layer.weight_bits}A{act}" + ("" if self.split is None else f", split={self.split}")


class FakeQuantLinear(nn.Linear):
    """A linear layer whose weight stays a trainable floating-point parameter and is rounded in every call."""

    own_class: ClassVar[type[Any]] = nn.Linear
    quantizer: FakeQuantizer

    def forward(self, input: Tensor) -> Tensor:
        q = self.quantizer
        y = F.linear(q.input(input), q.weight(self.weight), self.bias)
        if q.bos_embedding is None:
            return y
        row = bos_row(self.weight, q.bos_embedding) if q.bos_output is None else q.bos_output
        row = row if self.bias is None else row + self.bias
        return torch.where(bos_mask(input, q.bos_embedding), row.to(y.dtype), y)


class FakeQuantConv2d(nn.Conv2d):
    """A convolution whose weight stays a trainable floating-point parameter and is rounded in every call.

    Instances come from ``with_fake_quantizer`` only. Calling the class makes a plain nn.Conv2d: peft builds the parts
    of an adapter with the class of the layer that it wraps.
    """

    own_class: ClassVar[type[Any]] = nn.Conv2d
    quantizer: FakeQuantizer

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return nn.Conv2d(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        q = self.quantizer
        return super()._conv_forward(q.input(input), q.weight(weight), bias)


def with_fake_quantizer(module: nn.Linear | nn.Conv2d, quantizer: FakeQuantizer) -> nn.Linear | nn.Conv2d:
    """Changes the class of ``module`` to the fake-quantized one, in place; parameters and hooks stay the same objects.
    Raises QuantizationError as ``refuse_own_product`` does."""
    refuse_own_product(module)
    become(module, FakeQuantLinear if isinstance(module, nn.Linear) else FakeQuantConv2d)
    module.quantizer = quantizer.to(module.weight.device)
    return module


def refuse_own_product(module: nn.Module) -> None:
    """Raises QuantizationError for a layer whose class overrides ``forward`` and does not call ``super().forward``, in
    which the weight would be rounded."""
    own = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    code = getattr(inspect.unwrap(vars(own)["forward"]), "__code__", None)
    if own in (nn.Linear, nn.Conv2d, FakeQuantLinear) or code is None:
        return
    if not {"forward", "_conv_forward"} & set(code.co_names):
        raise QuantizationError(
            f"{own.__name__}.forward does not call super().forward, where fake mode would round; call it there, use "
            "mode='real', or give the layer 16 bits"
        )


def without_fake_quantizer(module: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Undoes ``with_fake_quantizer``: the class is what it was, parameters stay as they are now."""
    layer: Any = module
    if isinstance(layer, FakeQuantLinear | FakeQuantConv2d):
        del layer.quantizer
        restore(layer)
    return module


def become(module: Any, kind: type[nn.Module]) -> None:
    """Changes the class of ``module`` to ``kind`` in place, keeping parameters and hooks. If the module's class is not
    a base of ``kind``, such as a user's subclass of nn.Linear, the two are mixed: its ``super().forward`` is then that
    of ``kind``."""
    own = type(module)
    if not issubclass(own, kind):
        if issubclass(kind, own):
            module.__class__ = kind
        else:
            mix_in(module, kind, name=f"{kind.__name__}Of{own.__name__}", ours_first=False)
