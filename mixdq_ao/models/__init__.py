"""diffusers models and pipelines: drawing, saving, loading."""

from .diffusers_config import MixDQConfig
from .diffusers_quantizer import MixDQQuantizer, attach_quantizer
from .serialization import load_quantized, save_pipeline, save_quantized

__all__ = [
    "MixDQConfig",
    "MixDQQuantizer",
    "attach_quantizer",
    "load_quantized",
    "save_pipeline",
    "save_quantized",
]
