"""LoRA adapters over quantized layers: ``pipe.load_lora_weights``, scales, hot-swapping, fusing and unfusing.

peft wraps quantized layers in the classes of this module (``registration.py``). While an adapter is not fused, the
output is that of the layer plus ``scale * B(A(x))`` in floating point:

    rows of text                y(x) + s B A x        y: the integer product
    the BOS row of to_k, to_v   W bos + s B A bos     W: the full-precision weight, as ``bos_output`` keeps it

so a BOS row is that of the full-precision model with the adapter, however large it is. Fusing keeps this: the row
becomes ``bos_output + s B A bos``, and only the weight is rounded anew.

Static input ranges stay those of the plan: calibrate with the adapters that will be used (fused into the full-precision
pipeline while calibrating), else activations that they change upstream may leave the ranges. Fusing rounds once more:
below 8 bits that loses an adapter much smaller than a quantization step, which is better left unfused.

Scales are tensors, so that changing them, or swapping in an adapter of the same rank, does not recompile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..errors import QuantizationError
from ..layer_plan import LayerPlan
from ..quantize.quantizer import ActQuant, quantize_weight
from ..quantize.tensor import MixDQTensor, SplitMixDQTensor
from .plan_of import layer_plan_of

Quantized = MixDQTensor | SplitMixDQTensor


def adapted_layer(target: Any, adapter_name: str, *, config: Any, **kwargs: Any) -> Any:
    """Wraps ``target``, a quantized nn.Linear or nn.Conv2d, in a layer with an adapter; called by peft.

    Raises:
        QuantizationError: the kind of adapter or of initialization changes the weight itself, or smoothing or rotation
            is folded into the layer (also where it is not quantized).
    """
    layer = getattr(target, "base_layer", target)
    name = kwargs.get("target_name", type(layer).__name__)
    if getattr(layer, "folded", False):
        raise QuantizationError(
            f"layer {name!r}: smoothing or rotation is folded into its weight, which no adapter knows of; fuse the "
            "adapter into the original model (pipe.fuse_lora), calibrate that and quantize it"
        )
    if str(config.init_lora_weights).lower() not in ("true", "false", "gaussian", "orthogonal", "eva"):
        raise QuantizationError(
            f"layer {name!r}: init_lora_weights={config.init_lora_weights!r} changes the weight, which is quantized; "
            "expected True, False, 'gaussian', 'orthogonal' or 'eva'"
        )
    if config.use_dora:
        raise QuantizationError(f"layer {name!r}: use_dora scales the weight, which is quantized; use a plain LoRA")
    cls = MixDQLoraLinear if isinstance(layer, nn.Linear) else MixDQLoraConv2d
    if isinstance(layer, nn.Linear):
        kwargs["is_target_conv_1d_layer"] = False
    return cls(target, adapter_name, config=config, **kwargs)


@dataclass(frozen=True)
class Fused:
    """A copy of an adapter, made when it is fused: the adapter itself may be changed or deleted afterwards.

    Attributes:
        a, b: weights [rank, K, ...] and [N, rank, ...]. bias: [N], of the layer ``lora_B``, or None.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scale: float

    @classmethod
    def of(cls, layer: Any, name: str) -> Fused:
        a, b = (part[name].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
        bias = layer.lora_B[name].bias.detach().clone() if layer.lora_bias[name] else None
        return cls(a, b, bias, float(layer.scaling[name]))

    def delta(self, weight: Tensor) -> Tensor:
        """The change of a weight by the adapter: float32, in the weight's shape, on its device."""
        a, b = (part.to(device=weight.device, dtype=torch.float32).flatten(1) for part in (self.a, self.b))
        return self.scale * (b @ a).reshape(weight.shape)


class _OverQuantized:
    """Overrides of peft's LoRA layers for quantized weights.

    Attributes:
        original: weight and bias without adapters while some are fused, else None.
        fused: the fused adapters by name.
    """

    original: tuple[nn.Parameter, nn.Parameter | None] | None = None
    fused: dict[str, Fused]
    scaling: dict[str, Any]
    merged_adapters: list[str]
    lora_A: Any
    lora_B: Any
    lora_bias: dict[str, bool]

    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]
        self._scales_as_tensors()

    def set_scale(self: Any, adapter: str, scale: Any) -> None:
        super().set_scale(adapter, scale)  # type: ignore[misc]
        self._scales_as_tensors()

    def unscale_layer(self: Any, scale: Any = None) -> None:
        super().unscale_layer(scale)  # type: ignore[misc]
        self._scales_as_tensors()

    def _scales_as_tensors(self: Any) -> None:
        """Makes new tensors of all scales, never in place: backward may still need the values of the last ones."""
        device = self.get_base_layer().weight.device
        for adapter, scale in self.scaling.items():
            self.scaling[adapter] = torch.as_tensor(scale, dtype=torch.float32, device=device)

    @torch.no_grad()
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuses adapters: the weight becomes the quantized sum of the original one and all of them.

        The packed original is kept for ``unmerge``. ``safe_merge`` has no effect: NaN and infinity are always refused.

        Raises:
            QuantizationError: the sum holds NaN or infinity, the layer is a grouped convolution, or an adapter has a
                bias and the layer has none.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) or () if n in self.lora_A]
        if not names:
            return
        layer = self.get_base_layer()
        weight, bias = self._original()
        if getattr(layer, "groups", 1) > 1:
            raise QuantizationError(f"{layer}: a grouped convolution; adapters of it cannot be fused")
        adapters = {**getattr(self, "fused", {}), **{n: Fused.of(self, n) for n in names}}
        delta = torch.stack([adapter.delta(weight) for adapter in adapters.values()]).sum(0)
        fused = nn.Parameter(requantized(weight, delta, getattr(layer, "layer_plan", None)), requires_grad=False)
        fused_bias = self._fused_bias(bias, list(adapters.values()))
        self.original, self.fused = (weight, bias), adapters
        layer.weight, layer.bias = fused, fused_bias
        self.merged_adapters.extend(names)

    def unmerge(self: Any) -> None:
        """Removes all fused adapters: restores the original weight, to the bit, on the device and in the type that the
        layer has now."""
        if self.original is None:
            return
        layer = self.get_base_layer()
        layer.weight, layer.bias = self._original()
        self.original, self.fused = None, {}
        self.merged_adapters.clear()

    def _original(self: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight and bias without adapters, on the device and in the type that the layer has now."""
        layer = self.get_base_layer()
        weight, bias = self.original or (layer.weight, layer.bias)
        return _like(weight, layer.weight), None if bias is None else _like(bias, layer.weight)

    def _fused_bias(self: Any, bias: nn.Parameter | None, adapters: list[Fused]) -> nn.Parameter | None:
        added = [a.scale * a.bias for a in adapters if a.bias is not None]
        if not added:
            return bias
        if bias is None:
            raise QuantizationError(f"{self.get_base_layer()}: has no bias, but an adapter does; it cannot be fused")
        whole = bias + torch.stack(added).sum(0).to(bias.device)
        return nn.Parameter(whole.to(bias.dtype), requires_grad=False)


class MixDQLoraLinear(_OverQuantized, LoraLinear):
    """peft's LoRA layer over a quantized nn.Linear."""


class MixDQLoraConv2d(_OverQuantized, LoraConv2d):
    """peft's LoRA layer over a quantized nn.Conv2d."""


def _like(parameter: nn.Parameter, other: Tensor) -> nn.Parameter:
    """``parameter`` on the device and in the type of ``other``; itself where it already is."""
    moved = parameter.to(device=other.device, dtype=other.dtype)
    return parameter if moved is parameter else nn.Parameter(moved, requires_grad=parameter.requires_grad)


def requantized(weight: Quantized, delta: Tensor, layer: LayerPlan | None = None) -> Quantized:
    """``weight + delta``, quantized as ``weight`` is: bits, symmetry, input ranges, split; scales are chosen anew.

    Args:
        weight: [N, K] or [O, C, kh, kw]. delta: floating point, of the same shape.
        layer: the layer's plan, for its ``weight_range``; None for "minmax". Ranges and roundings that need moments of
            the input, which a model does not keep, become "mse" and "nearest".

    Raises:
        QuantizationError: the sum holds NaN or infinity.
    """
    if isinstance(weight, SplitMixDQTensor):
        first, second = delta.tensor_split([weight.split], 1)
        halves = requantized(weight.first, first, layer), requantized(weight.second, second, layer)
        assert isinstance(halves[0], MixDQTensor) and isinstance(halves[1], MixDQTensor)
        return SplitMixDQTensor(halves[0], halves[1], weight.dtype)
    simple = layer is None or (layer.weight_range == "minmax" and layer.rounding == "nearest")
    quant = quantize_weight(
        weight.dequantize(torch.float32) + delta.float(),
        weight.bits,
        symmetric=layer_plan_of(weight).symmetric,
        weight_range="minmax" if simple else "mse",
    )
    bos = {"bos_embedding": weight.bos_embedding, "bos_output": _bos_output(weight, delta)}
    return MixDQTensor.from_codes(quant, weight.bits, weight.dtype, act=_act(weight), **bos)


def _act(weight: MixDQTensor) -> ActQuant | None:
    act = weight.act
    if act is None or weight.act_scale is None:
        return None
    return ActQuant(weight.act_scale.item(), act[0].item(), int(act[1].item()), act[2])


def _bos_output(weight: MixDQTensor, delta: Tensor) -> Tensor | None:
    """The full-precision BOS row plus the adapter's contribution, in float64, rounded once."""
    if weight.bos_output is None or weight.bos_embedding is None:
        return None
    return (weight.bos_output.double() + delta.double() @ weight.bos_embedding.double()).to(weight.bos_output.dtype)
