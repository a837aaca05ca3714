"""Applies plans and schedules to pipelines, for the commands."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import Moments, QuantizationError, bos_aware, mixdq_config, quantize_
from ..models.bos_encoder import bos_embedding_of
from ..models.pipelines import denoiser
from ..plan import Plan
from ..temporal.layer import Storage
from ..temporal.plan import TemporalPlan
from ..temporal.runtime import prepare


def apply_plan(pipe: Any, plan: Plan, moments: Path | None = None) -> None:
    """Quantizes the denoiser of ``pipe`` in place, and makes its text encoders BOS-aware if the plan has BOS rows.

    ``moments``: a file of ``Moments.save``, for a plan with compensated rounding.
    """
    quantize_(denoiser(pipe), mixdq_config(plan, moments=None if moments is None else Moments.load(moments)))
    check_text_encoders(pipe, plan)


def check_text_encoders(pipe: Any, *plans: Plan | None) -> None:
    """Makes the text encoders check their BOS row from now on, if a plan has BOS rows."""
    if any(layer.bos for plan in plans if plan is not None for layer in plan.layers.values()):
        bos_aware(pipe)


def refuse_quantized(model: nn.Module) -> None:
    """Raises QuantizationError for a model that was saved quantized, on which loading ignores a quantization config."""
    if getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False):
        raise QuantizationError(
            f"{type(model).__name__} is quantized already; give the original pipeline to quantize it anew"
        )


def make_ready(pipe: Any, plan: Plan | None, *, compiled: bool) -> None:
    """Prepares a loaded pipeline for drawing: quantizes it by ``plan`` if given; makes the text encoders BOS-aware if
    the denoiser has BOS rows; compiles the denoiser if ``compiled``."""
    if plan is not None:
        apply_plan(pipe, plan)
    elif bos_embedding_of(denoiser(pipe)) is not None:
        bos_aware(pipe)
    if compiled:
        compile_denoiser(pipe)


def make_scheduled(
    pipe: Any, schedule: TemporalPlan, *, storage: Storage = "nested", keep_full: bool = False, compiled: bool = False
) -> None:
    """Makes a loaded full-precision pipeline run each step at its level of ``schedule``; compiles if ``compiled``."""
    runtime = prepare(denoiser(pipe), schedule, storage=storage, keep_full=keep_full)
    check_text_encoders(pipe, *schedule.levels.values())
    if compiled:
        compile_denoiser(pipe)
    runtime.follow(pipe)


def compile_denoiser(pipe: Any) -> None:
    """Replaces the denoiser by the compiled denoiser, without guards on its layers, whose checks take milliseconds
    before each call. The layers must not be replaced from now on."""
    model = denoiser(pipe)
    name = next(n for n in ("unet", "transformer") if getattr(pipe, n, None) is model)
    guards = torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe
    setattr(pipe, name, torch.compile(model, fullgraph=True, options={"guard_filter_fn": guards}))


def save_png(image: Tensor, directory: Path, number: int, prompt: str) -> Path:
    """Writes a picture, uint8 [3, H, W], under its number and the start of its prompt."""
    from ..evaluate.resize import to_pillow

    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
    path = directory / f"{number:04d}{'-' + slug if slug else ''}.png"
    to_pillow(image).save(path)
    return path


def quantized_unet(unet: nn.Module, plan: Plan) -> nn.Module:
    """A quantized copy of ``unet``, which is left unchanged."""
    unet = copy.deepcopy(unet)
    quantize_(unet, mixdq_config(plan))
    return unet


def quantized(pipe: Any, plan: Plan) -> Any:
    """A shallow copy of the pipeline with a quantized copy of its UNet."""
    clone = copy.copy(pipe)
    object.__setattr__(clone, "unet", quantized_unet(pipe.unet, plan))
    return clone
