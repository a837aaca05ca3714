"""Mixed-precision quantization of few-step diffusion models for torch.compile and torchao.

    from mixdq_ao import Plan, mixdq_config, quantize_
    quantize_(pipe.unet, mixdq_config(Plan.load("plan.json")))
    pipe.unet = torch.compile(pipe.unet, fullgraph=True)

Names are imported when first used, so that reading a plan needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register

if TYPE_CHECKING:
    from .errors import (
        AllocationError,
        CalibrationError,
        CheckpointError,
        MixDQError,
        OptimizerError,
        PlanError,
        QuantizationError,
        ScheduleError,
        SensitivityError,
        TextEncoderError,
    )
    from .models.bos_encoder import BOSAwareTextEncoder, bos_aware
    from .models.components import quantize_text_encoders, quantize_vae
    from .models.fused_projections import fuse_projections, unfuse_projections
    from .models.fused_text import fuse_text_projections, unfuse_text_projections
    from .models.pipelines import Sampling, generate
    from .models.serialization import load_quantized, save_pipeline, save_quantized
    from .models.text_reuse import forget_text_projections, reuse_text_projections
    from .plan import LayerPlan, Plan, PlanSummary
    from .quantize.config import MixDQLayerConfig, mixdq_config, quantize_
    from .quantize.tensor import MixDQTensor
    from .search.allocate import allocate
    from .search.allocation import Allocation
    from .search.analyze import analyze, analyze_part
    from .search.calibrate import Calibrator, calibrate
    from .search.calibration import Calibration
    from .search.distributed import RayWorkers
    from .search.joint import allocate_jointly
    from .search.latency import layer_latencies
    from .search.limits import Limits
    from .search.moments import Moments, input_moments
    from .search.orthogonality import Orthogonality, orthogonality
    from .search.orthogonality_allocate import allocate_orthogonal
    from .search.pareto import pareto, pareto_jointly
    from .search.part import Part
    from .search.prediction import check_prediction
    from .search.sensitivity import LayerSensitivity, Sensitivity
    from .search.smoothing import smooth_
    from .temporal.plan import TemporalPlan
    from .temporal.runtime import LevelRuntime, prepare
    from .temporal.schedule import Schedule, search_schedule
    from .temporal.step_allocation import allocate_steps
    from .temporal.step_probe import probe_steps
    from .training.optim import MemoryEfficientAdamW, MemoryEfficientSGD
    from .training.recover import Recovery, recover

_HOME = {
    "AllocationError": "errors",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "MixDQError": "errors",
    "OptimizerError": "errors",
    "PlanError": "errors",
    "QuantizationError": "errors",
    "ScheduleError": "errors",
    "SensitivityError": "errors",
    "TextEncoderError": "errors",
    "quantize_text_encoders": "models.components",
    "quantize_vae": "models.components",
    "fuse_projections": "models.fused_projections",
    "unfuse_projections": "models.fused_projections",
    "fuse_text_projections": "models.fused_text",
    "unfuse_text_projections": "models.fused_text",
    "Sampling": "models.pipelines",
    "generate": "models.pipelines",
    "load_quantized": "models.serialization",
    "save_pipeline": "models.serialization",
    "save_quantized": "models.serialization",
    "reuse_text_projections": "models.text_reuse",
    "forget_text_projections": "models.text_reuse",
    "LayerPlan": "plan",
    "Plan": "plan",
    "PlanSummary": "plan",
    "BOSAwareTextEncoder": "models.bos_encoder",
    "bos_aware": "models.bos_encoder",
    "MixDQLayerConfig": "quantize.config",
    "mixdq_config": "quantize.config",
    "quantize_": "quantize.config",
    "MixDQTensor": "quantize.tensor",
    "Allocation": "search.allocation",
    "allocate": "search.allocate",
    "analyze": "search.analyze",
    "analyze_part": "search.analyze",
    "Calibrator": "search.calibrate",
    "calibrate": "search.calibrate",
    "Calibration": "search.calibration",
    "RayWorkers": "search.distributed",
    "allocate_jointly": "search.joint",
    "layer_latencies": "search.latency",
    "Limits": "search.limits",
    "Moments": "search.moments",
    "input_moments": "search.moments",
    "Orthogonality": "search.orthogonality",
    "orthogonality": "search.orthogonality",
    "allocate_orthogonal": "search.orthogonality_allocate",
    "pareto": "search.pareto",
    "pareto_jointly": "search.pareto",
    "Part": "search.part",
    "check_prediction": "search.prediction",
    "LayerSensitivity": "search.sensitivity",
    "Sensitivity": "search.sensitivity",
    "smooth_": "search.smoothing",
    "TemporalPlan": "temporal.plan",
    "LevelRuntime": "temporal.runtime",
    "prepare": "temporal.runtime",
    "Schedule": "temporal.schedule",
    "search_schedule": "temporal.schedule",
    "allocate_steps": "temporal.step_allocation",
    "probe_steps": "temporal.step_probe",
    "MemoryEfficientAdamW": "training.optim",
    "MemoryEfficientSGD": "training.optim",
    "Recovery": "training.recover",
    "recover": "training.recover",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]


register()
