"""Quantization of a pipeline's other models: text encoders with 8-bit weights, the VAE's decoder with 8-bit layers.

Quantize the text encoders *before* calibrating the denoiser: its ranges, and the BOS row it recognises, depend on the
embeddings that the encoders give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, MixDQError, QuantizationError
from ..layer_plan import LayerPlan
from ..layers import check_module, find_layers
from ..plan import Plan
from ..quantize.config import MixDQLayerConfig, mixdq_config, quantize_, quantized_weight
from .pipelines import text_encoders


def quantize_text_encoders(pipe: Any, *, weight_bits: int = 8) -> dict[str, Plan]:
    """Quantizes the weights of every linear layer of the text encoders (CLIP, T5) in place; activations stay.

    Text encoders run once per prompt, so that memory matters more than speed, and their activations have outliers
    hundreds of times the usual values (the BOS row). Returns the plans by attribute name; saving and loading the
    pipeline keeps them.

    Raises MixDQError for a pipeline without text encoders.
    """
    plans, encoders = {}, text_encoders(pipe)
    if not encoders:
        raise MixDQError(f"pipe is a {type(pipe).__name__} without text encoders, expected a diffusers pipeline")
    for name, encoder in encoders.items():
        plans[name] = Plan.uniform(encoder, weight_bits, 16)
        quantize_(encoder, mixdq_config(plans[name]))
    return plans


@torch.no_grad()
def vae_sensitivity(vae: nn.Module, latents: Tensor, *, weight_bits: int = 8, act_bits: int = 8) -> dict[str, float]:
    """The SQNR in dB of decoded pictures with one layer of the decoder quantized, by the layer's name.

    latents: [B, C, h, w] as ``vae.decode`` takes them, of real pictures. The model is restored on return.
    """
    return _measured(vae, latents, _calibrated(vae, latents, weight_bits, act_bits))


def _calibrated(vae: Any, latents: Tensor, weight_bits: int, act_bits: int) -> Plan:
    """A uniform plan of the layers that decoding runs, with their ranges."""
    from ..search.calibrate import calibrate

    calibration = calibrate(vae, run=lambda: vae.decode(latents))
    layer = LayerPlan(weight_bits=weight_bits, act_bits=act_bits)
    return Plan(dict.fromkeys(calibration.layers, layer)).with_calibration(calibration)


def _measured(vae: Any, latents: Tensor, plan: Plan) -> dict[str, float]:
    layers, result = find_layers(vae), {}
    exact = vae.decode(latents, return_dict=False)[0].double()
    for name, layer in plan.layers.items():
        module, weight = layers[name], layers[name].weight
        module.weight = nn.Parameter(quantized_weight(weight, MixDQLayerConfig(layer, name=name)), requires_grad=False)
        try:
            error = vae.decode(latents, return_dict=False)[0].double() - exact
        finally:
            module.weight = weight
        result[name] = float(10 * torch.log10(exact.square().sum() / error.square().sum().clamp(min=1e-30)))
    return result


@torch.no_grad()
def quantize_vae(
    vae: nn.Module, latents: Tensor, *, floor: float = 30.0, sensitivity: Mapping[str, float] | None = None
) -> Plan:
    """Quantizes the layers of the VAE's decoder to 8 bits in place, except sensitive ones.

    Args:
        vae: ``pipe.vae``. latents: [B, C, h, w] as ``vae.decode`` takes them, for calibration.
        floor: in dB. A layer keeps 16 bits if the decoded pictures have a lower SQNR with it alone quantized.
        sensitivity: the result of ``vae_sensitivity``, if there is one already.

    Raises:
        CalibrationError: no layer reaches the floor. QuantizationError: ``vae`` is not a VAE.
    """
    if not hasattr(check_module(vae), "decode"):
        raise QuantizationError(f"vae is a {type(vae).__name__}, which decodes nothing; expected pipe.vae")
    plan = _calibrated(vae, latents, 8, 8)
    found = sensitivity if sensitivity is not None else _measured(vae, latents, plan)
    kept = {n: v if found.get(n, -torch.inf) >= floor else LayerPlan() for n, v in plan.layers.items()}
    if not any(v.quantized for v in kept.values()):
        best = max(found.values(), default=float("nan"))
        raise CalibrationError(
            f"no layer of {type(vae).__name__} reaches {floor} dB (best {best:.1f}); lower the floor"
        )
    plan = Plan(kept, {**plan.metadata, "sqnr_alone": dict(found)})
    quantize_(vae, mixdq_config(plan))
    return plan
