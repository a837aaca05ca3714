"""Models and pipelines of diffusers and transformers: sampling, saving, loading."""

from ..quantize.config import declare_quantized as attach_quantizer
from .diffusers_config import MixDQConfig
from .diffusers_quantizer import MixDQQuantizer
from .serialization import load_quantized, save_pipeline, save_quantized

__all__ = [
    "MixDQConfig",
    "MixDQQuantizer",
    "attach_quantizer",
    "load_quantized",
    "save_pipeline",
    "save_quantized",
]
