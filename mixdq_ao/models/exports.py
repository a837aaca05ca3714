"""Exports a plan to the formats of other tools: ModelOpt's ``quantized_layers`` and torchao's ``FqnToConfig``, as JSON.

Both give the bits of each layer. Neither can express static per-tensor ranges, split shortcuts or BOS rows: a tool that
reads them quantizes by its own method. Only ``save_quantized`` keeps a quantized model exactly.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig, config_to_dict
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
)

from ..errors import PlanError
from ..jsonfile import write_document
from ..layer_plan import LayerPlan
from ..layers import find_layers
from ..plan import Plan
from ..plan_check import check_plan

# Names of TensorRT-LLM's QuantAlgo, which ModelOpt writes. Other bit widths get a name of the same form.
ALGORITHMS = {
    (8, 8): "W8A8_SQ_PER_CHANNEL",
    (8, 16): "W8A16",
    (4, 8): "W4A8_QSERVE_PER_CHANNEL",
    (4, 16): "W4A16",
}
INTEGERS = {bits: getattr(torch, f"int{bits}") for bits in (4, 2)}


def export_modelopt(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes ModelOpt's ``hf_quant_config.json``: the algorithm of each quantized layer, and the excluded layers."""
    layers = {name: _algorithm(layer) for name, layer in plan.layers.items() if layer.quantized}
    document = {
        "producer": {"name": "mixdq_ao", "version": _version()},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "quantized_layers": layers,
            "exclude_modules": sorted(set(plan.layers) - set(layers)),
        },
    }
    write_document(path, document)


def _algorithm(layer: LayerPlan) -> dict[str, Any]:
    bits = (layer.weight_bits, layer.act_bits)
    name = ALGORITHMS.get(bits, "W{}A{}".format(*bits))
    return {
        "quant_algo": name,
        "weight_bits": bits[0],
        "act_bits": bits[1],
        "has_zero_point": not layer.symmetric,
    }


def _version() -> str:
    try:
        return version("mixdq-ao")
    except PackageNotFoundError:
        return "unknown"


def export_torchao(plan: Plan, path: str | os.PathLike[str], model: nn.Module) -> list[str]:
    """Writes torchao's ``FqnToConfig`` for the linear layers of ``model``, as ``config_from_dict`` reads it.

    Weights are quantized per output channel; 8-bit activations become torchao's dynamic per-token ones. Returns the
    names of planned convolutions, which torchao's integer configs do not support and which are written as null.

    Raises:
        PlanError: the plan does not fit the model, or a layer has activations of 4 bits or weights of 16 with fewer
            activation bits, for which torchao has no config.
    """
    check_plan(plan, model, need_ranges=False)
    layers = find_layers(model)
    configs: OrderedDict[str, AOBaseConfig | None] = OrderedDict()
    for name, layer in plan.layers.items():
        linear = isinstance(layers[name], nn.Linear)
        configs[name] = _torchao_config(name, layer) if linear and layer.quantized else None
    write_document(path, config_to_dict(FqnToConfig(configs)))
    return [n for n, c in configs.items() if c is None and plan.layers[n].quantized]


def _torchao_config(name: str, layer: LayerPlan) -> AOBaseConfig:
    if layer.act_bits == 4 or layer.weight_bits == 16:
        raise PlanError(
            f"layer {name!r}: W{layer.weight_bits}A{layer.act_bits} has no torchao config; expected weights of 8, 4 or "
            "2 bits with activations of 8 or 16"
        )
    if layer.weight_bits == 8:
        if layer.act_bits == 16:
            return Int8WeightOnlyConfig()
        return Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC)
    kind, mapping = INTEGERS[layer.weight_bits], MappingType.SYMMETRIC if layer.symmetric else MappingType.ASYMMETRIC
    if layer.act_bits == 16:
        return IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerAxis(0), mapping_type=mapping)
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=kind, weight_granularity=PerAxis(0), weight_mapping_type=mapping
    )
