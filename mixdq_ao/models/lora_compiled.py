"""LoRA methods of pipelines whose denoiser ``torch.compile`` has wrapped; errors where adapters would have no effect.

diffusers' pipelines look for adapters in components of diffusers' and transformers' classes. After
``pipe.unet = torch.compile(pipe.unet)`` the component has another class: adapters are loaded into the model inside, but
``set_adapters`` says that there are none, and ``fuse_lora``, ``unload_lora_weights`` and ``delete_adapters`` do nothing
and raise nothing. While one of these methods runs, the quantized model takes the place of its wrapper. Compiled code is
kept, and recompiled only where adapters were added or removed.

``registration.py`` uses this module when diffusers' loaders are imported. It compares classes by name, so that it need
not import more. Pipelines without quantized models are not affected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from ..compat import uncompiled
from ..errors import QuantizationError
from ..registration import is_ours
from .joint_names import JOINT_TEXT, TEXT_REUSE

OF_PIPELINES = (
    "load_lora_weights",
    "unload_lora_weights",
    "fuse_lora",
    "unfuse_lora",
    "set_adapters",
    "disable_lora",
    "enable_lora",
    "delete_adapters",
    "get_active_adapters",
    "get_list_adapters",
)
OF_MODELS = ("load_lora_adapter", "add_adapter")


def watch_pipelines(module: ModuleType) -> None:
    """Makes the LoRA methods of the pipeline classes in ``module`` see through ``torch.compile``."""
    _replace(module, OF_PIPELINES, unwrapped)


def watch_models(module: ModuleType) -> None:
    """Makes the model classes in ``module`` refuse adapters where they would have no effect."""
    _replace(module, OF_MODELS, checked)


def _replace(module: ModuleType, names: tuple[str, ...], around: Callable[[Any], Any]) -> None:
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            for name in names:
                if name in vars(cls):
                    setattr(cls, name, _inside(around, getattr(cls, name)))


def _inside(around: Callable[[Any], Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with around(self):
            return method(self, *args, **kwargs)

    return run


@contextmanager
def unwrapped(pipe: Any) -> Iterator[None]:
    """Replaces compiled quantized components of ``pipe`` by the models inside them, for the block."""
    held: dict[str, Any] = {}
    for name in getattr(pipe, "_lora_loadable_modules", ()):
        component: Any = getattr(pipe, name, None)
        wrapper = type(component).__name__ == "OptimizedModule"
        if wrapper and not hasattr(component, "_hf_hook") and _quantized(component):
            held[name] = component
    try:
        for name, component in held.items():
            object.__setattr__(pipe, name, uncompiled(component))  # not the pipeline's, which records classes
        yield
    finally:
        for name, component in held.items():
            object.__setattr__(pipe, name, component)


@contextmanager
def checked(model: Any) -> Iterator[None]:
    """Raises QuantizationError where ``model`` bypasses layers that take adapters."""
    if hasattr(model, TEXT_REUSE):
        raise QuantizationError(
            "the UNet keeps keys and values of the text, which adapters change; forget_text_projections(pipe) before "
            "adapters are loaded, and reuse_text_projections(pipe) again when they are as they are to stay"
        )
    if type(getattr(model, "hf_quantizer", None)).__name__ == "PreparedQuantizer":  # imported after this module
        raise QuantizationError(
            "the model is prepared for a precision per step, whose layers take no adapters; fuse them into the "
            "original (pipe.fuse_lora(), then pipe.unload_lora_weights()), calibrate and prepare() that"
        )
    if hasattr(model, JOINT_TEXT):
        raise _useless("keys and values of the text", "unfuse_text_projections(unet)")
    for name, module in model.named_modules():
        if getattr(module, "fused_projections", False) and _quantized(module):
            raise _useless(f"the projections of {name!r}", "unfuse_projections(model)")
    yield


def _useless(what: str, undo: str) -> QuantizationError:
    return QuantizationError(
        f"{what} are computed as one, past which adapters would do nothing; {undo} before adapters are loaded"
    )


def _quantized(model: nn.Module) -> bool:
    return any(map(is_ours, model.parameters()))
