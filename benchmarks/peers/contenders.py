"""What is compared: each peer in its documented form, given a copy of the full-precision UNet and captions.

Every function quantizes the UNet it is given, in place or not, and returns it. Peers are imported when they are used,
so that one that is not installed is a row that says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .subject import Subject

Quantize = Callable[[nn.Module, Subject], nn.Module]
SMALL = {"minimum_allowed_numel": 256, "minimum_allowed_channel_size": 4, "add_skip_keys": False}
"""The bundled UNet has 3 million weights: limits made for billions would leave half of it alone."""


@dataclass(frozen=True, slots=True)
class Contender:
    """``package``: as on PyPI. ``stored``: whether the bytes held are those of the quantized weights; fake quantization
    holds full precision and gives ``bits`` for an estimate."""

    name: str
    package: str
    quantize: Quantize
    stored: bool = True
    bits: float | None = None


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


PEERS = (
    Contender("torchao int8 weights", "torchao", _torchao(_int8_weight_only)),
    Contender("torchao int8 dynamic", "torchao", _torchao(_int8_dynamic)),
    Contender("torchao int4 weights", "torchao", _torchao(_intx(4))),
    Contender("quanto int8 weights", "optimum-quanto", _quanto("qint8")),
    Contender("quanto int8 weights and activations", "optimum-quanto", _quanto("qint8", "qint8")),
    Contender("quanto int4 weights", "optimum-quanto", _quanto("qint4")),
    Contender("quanto int2 weights", "optimum-quanto", _quanto("qint2")),
    Contender("SDNQ int8", "sdnq", _sdnq("int8")),
    Contender(
        "SDNQ int8, int8 products", "sdnq", _sdnq("int8", use_quantized_matmul=True, use_quantized_matmul_conv=True)
    ),
    Contender("SDNQ uint4", "sdnq", _sdnq("uint4")),
    Contender("SDNQ uint4, SVD", "sdnq", _sdnq("uint4", use_svd=True, svd_rank=8)),
    Contender("SDNQ uint4, dynamic", "sdnq", _sdnq("uint4", use_dynamic_quantization=True)),
    Contender("SDNQ uint3", "sdnq", _sdnq("uint3")),
    Contender("SDNQ uint2", "sdnq", _sdnq("uint2")),
    Contender("ModelOpt int8 SmoothQuant", "nvidia-modelopt", _modelopt(("INT8_SMOOTHQUANT_CFG",)), False, 8.0),
    Contender("ModelOpt int8", "nvidia-modelopt", _modelopt(("INT8_DEFAULT_CFG",)), False, 8.0),
    Contender(
        "ModelOpt auto_quantize, 6 bits",
        "nvidia-modelopt",
        _modelopt(("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_DEFAULT_CFG"), 6.0),
        False,
        6.0,
    ),
)
