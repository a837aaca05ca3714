"""What is compared: each peer in its documented form, given a copy of the full-precision UNet and captions.

Every function quantizes the UNet it is given, in place or not, and returns it. Peers are imported when they are used,
so that one that is not installed is a row that says so. SDNQ compiles its own functions the first time each shape is
met, which takes minutes and is not what is compared: it is told not to, before it is imported.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .autoround import auto_round
from .exported import pt2e
from .subject import Subject

os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")

Quantize = Callable[[nn.Module, Subject], nn.Module]
SMALL = {"minimum_allowed_numel": 256, "minimum_allowed_channel_size": 4, "add_skip_keys": False}
"""The bundled UNet has 3 million weights: limits made for billions would leave half of it alone."""


@dataclass(frozen=True, slots=True)
class Contender:
    """``package``: as on PyPI. ``does``: what of the model it reaches. ``stored``: whether the bytes held are those of
    the quantized weights; fake quantization holds full precision, and its bytes are computed."""

    name: str
    package: str
    quantize: Quantize
    does: str
    stored: bool = True


def _torchao(config: Callable[[], Any]) -> Quantize:
    def quantize(unet: nn.Module, subject: Subject) -> nn.Module:
        from torchao.quantization import quantize_

        quantize_(unet, config())
        return unet

    return quantize


def _int8_weight_only() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int8_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _float8_weights() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def _float8_dynamic() -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

    return Float8DynamicActivationFloat8WeightConfig()


def _int8_static(unet: nn.Module, subject: Subject) -> nn.Module:
    """One scale per input tensor from its largest magnitude over the calibrating captions."""
    from torchao.quantization import FqnToConfig, Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_

    linear = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Linear)}
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            shape = [1] * args[0].dim()  # torchao wants as many dimensions as the input has
            largest[name] = torch.maximum(largest.get(name, torch.zeros(shape)), args[0].abs().max())

        return hook

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in linear.items()]
    subject.draw(unet, subject.calibrating)
    for handle in handles:
        handle.remove()
    configs = {
        name: Int8StaticActivationInt8WeightConfig(act_quant_scale=value / 127, granularity=[PerTensor(), PerRow()])
        for name, value in largest.items()
    }
    quantize_(unet, FqnToConfig(configs), filter_fn=None)
    return unet


def _cast(dtype: torch.dtype) -> Quantize:
    """All weights and activations in ``dtype``; the pipeline around it stays in float32."""

    def quantize(unet: nn.Module, subject: Subject) -> nn.Module:
        unet.to(dtype)

        def cast(tree: Any, to: torch.dtype) -> Any:
            change = lambda t: t.to(to) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
            return torch.utils._pytree.tree_map(change, tree)

        unet.register_forward_pre_hook(
            lambda _, args, kwargs: (cast(args, dtype), cast(kwargs, dtype)), with_kwargs=True
        )
        unet.register_forward_hook(lambda _, args, output: cast(output, torch.float32))
        return unet

    return quantize


def _intx(bits: int) -> Callable[[], Any]:
    def config() -> Any:
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerAxis

        return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerAxis(0))

    return config


def _quanto(weights: str, activations: str | None = None) -> Quantize:
    def quantize(unet: nn.Module, subject: Subject) -> nn.Module:
        from optimum import quanto

        q = {"qint2": quanto.qint2, "qint4": quanto.qint4, "qint8": quanto.qint8, None: None}
        quanto.quantize(unet, weights=q[weights], activations=q[activations])
        if activations is not None:
            with quanto.Calibration():
                subject.draw(unet, subject.calibrating)
        quanto.freeze(unet)
        return unet

    return quantize


def _sdnq(dtype: str, **options: Any) -> Quantize:
    def quantize(unet: nn.Module, subject: Subject) -> nn.Module:
        from sdnq import sdnq_post_load_quant

        return sdnq_post_load_quant(unet, weights_dtype=dtype, quant_conv=True, **SMALL, **options)

    return quantize


def _modelopt(configs: tuple[str, ...], bits: float | None = None) -> Quantize:
    """Fake quantization; with ``bits`` the formats are chosen per layer by its gradient-based search."""

    def quantize(unet: nn.Module, subject: Subject) -> nn.Module:
        import modelopt.torch.quantization as mtq

        def loop(model: nn.Module) -> None:
            subject.draw(model, subject.calibrating)

        if bits is None:
            return mtq.quantize(unet, copy.deepcopy(getattr(mtq, configs[0])), loop)
        calls = subject.calls(unet, subject.calibrating)
        found, _ = mtq.auto_quantize(
            unet,
            constraints={"effective_bits": bits},
            quantization_formats=[copy.deepcopy(getattr(mtq, c)) for c in configs],
            data_loader=calls,
            forward_step=lambda model, call: model(**call["inputs"])[0],
            loss_func=lambda output, call: (output - call["output"]).square().mean(),
            num_calib_steps=len(calls),
            num_score_steps=len(calls),
        )
        return found

    return quantize


LINEAR, BOTH = "linear", "linear, convolution"
AUTO = ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_DEFAULT_CFG")
PRODUCTS = {"use_quantized_matmul": True, "use_quantized_matmul_conv": True}

PEERS = (
    Contender("torch bfloat16", "torch", _cast(torch.bfloat16), BOTH),
    Contender("torch float16", "torch", _cast(torch.float16), BOTH),
    Contender("PyTorch PT2E, X86InductorQuantizer", "torchao", pt2e, BOTH + ", activations"),
    Contender("torchao int8 weights", "torchao", _torchao(_int8_weight_only), LINEAR),
    Contender("torchao int8 dynamic", "torchao", _torchao(_int8_dynamic), LINEAR + ", activations"),
    Contender("torchao int8 static", "torchao", _int8_static, LINEAR + ", activations"),
    Contender("torchao float8 weights", "torchao", _torchao(_float8_weights), LINEAR),
    Contender("torchao float8 dynamic", "torchao", _torchao(_float8_dynamic), LINEAR + ", activations"),
    Contender("torchao int4 weights", "torchao", _torchao(_intx(4)), LINEAR),
    Contender("quanto int8 weights", "optimum-quanto", _quanto("qint8"), BOTH),
    Contender(
        "quanto int8 weights and activations", "optimum-quanto", _quanto("qint8", "qint8"), BOTH + ", activations"
    ),
    Contender("quanto int4 weights", "optimum-quanto", _quanto("qint4"), BOTH),
    Contender("quanto int2 weights", "optimum-quanto", _quanto("qint2"), BOTH),
    Contender("SDNQ int8", "sdnq", _sdnq("int8"), BOTH),
    Contender("SDNQ int8, int8 products", "sdnq", _sdnq("int8", **PRODUCTS), BOTH + ", activations"),
    Contender("SDNQ uint4", "sdnq", _sdnq("uint4"), BOTH),
    Contender("SDNQ uint4, SVD", "sdnq", _sdnq("uint4", use_svd=True, svd_rank=8), BOTH),
    Contender("SDNQ uint4, dynamic", "sdnq", _sdnq("uint4", use_dynamic_quantization=True), BOTH + ", mixed bits"),
    Contender("SDNQ uint3", "sdnq", _sdnq("uint3"), BOTH),
    Contender("SDNQ uint2", "sdnq", _sdnq("uint2"), BOTH),
    Contender(
        "ModelOpt int8 SmoothQuant",
        "nvidia-modelopt",
        _modelopt(("INT8_SMOOTHQUANT_CFG",)),
        BOTH + ", activations",
        False,
    ),
    Contender("ModelOpt int8", "nvidia-modelopt", _modelopt(("INT8_DEFAULT_CFG",)), BOTH + ", activations", False),
    Contender("ModelOpt auto_quantize, 6 bits", "nvidia-modelopt", _modelopt(AUTO, 6.0), BOTH + ", mixed bits", False),
    Contender("ModelOpt auto_quantize, 5 bits", "nvidia-modelopt", _modelopt(AUTO, 5.0), BOTH + ", mixed bits", False),
    Contender("AutoRound, 4 bits on average", "auto-round", auto_round, LINEAR + ", mixed bits", False),
)
