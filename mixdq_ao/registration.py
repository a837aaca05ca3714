"""Registers quantized weights with diffusers, transformers and peft once both they and we are imported, in any order.

    import mixdq_ao
    pipe = DiffusionPipeline.from_pretrained("saved-quantized-pipeline")

Importing ``mixdq_ao`` imports none of them: an import hook waits for their modules and enters stand-ins (``Lazy``) into
their tables, which import our classes when first used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

METHOD = "mixdq"


class Lazy:
    """A stand-in for an object of ours, whose module is imported on first use."""

    def __init__(self, home: str, name: str) -> None:
        self._home, self._name = home, name

    def _found(self) -> Any:
        return getattr(import_module(f".{self._home}", __package__), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._found(), name)


def _tables(home: str, quantizer: str) -> Callable[[ModuleType], None]:
    """Enters our config and quantizer into a library's tables of quantization methods."""

    def fill(module: ModuleType) -> None:
        module.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, Lazy("models.diffusers_config", "MixDQConfig"))
        module.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, Lazy(home, quantizer))

    return fill


QUANTIZED: list[Lazy] = []
"""Callbacks ``(model, plan)`` run after quantization, so that the model's library can save it; one for each library
that is imported, which ignores models of others."""
PREPARED: list[Lazy] = []
"""Callbacks ``(model)`` run after ``prepare``, so that the model's library refuses to save it."""


def _diffusers_models(module: ModuleType) -> None:
    QUANTIZED.append(Lazy("models.diffusers_quantizer", "attach_to_diffusers"))
    PREPARED.append(Lazy("models.prepared_quantizer", "declare_prepared"))


def _transformers_models(module: ModuleType) -> None:
    QUANTIZED.append(Lazy("models.transformers_quantizer", "attach_to_transformers"))


def is_ours(weight: object) -> bool:
    """Whether a tensor is a quantized weight. Compares class names, so that nothing is imported."""
    return type(weight).__name__ in ("MixDQTensor", "SplitMixDQTensor")


def _adapters(module: ModuleType) -> None:
    """Makes peft wrap our quantized layers in LoRA layers of ours; peft's dispatcher takes every torchao tensor for the
    weight of an nn.Linear."""
    theirs = module.dispatch_torchao

    def dispatch_torchao(target: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        layer = getattr(target, "base_layer", target)
        if is_ours(getattr(layer, "weight", None)) or getattr(layer, "folded", False):
            from .models.lora import adapted_layer

            return adapted_layer(target, adapter_name, *args, **kwargs)
        return theirs(target, adapter_name, *args, **kwargs)

    module.dispatch_torchao = dispatch_torchao  # type: ignore[attr-defined]


def _adapted(kind: str) -> Callable[[ModuleType], None]:
    """Patches the LoRA methods of pipelines or models in a module (``models.lora_compiled``)."""
    return lambda module: getattr(import_module(".models.lora_compiled", __package__), f"watch_{kind}")(module)


# {module: callback, called with the module after its import}
WATCHED: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.quantizers.auto": _tables("models.diffusers_quantizer", "MixDQQuantizer"),
    "transformers.quantizers.auto": _tables("models.transformers_quantizer", "MixDQTransformersQuantizer"),
    "peft.tuners.lora.model": _adapters,
    "diffusers.loaders.lora_base": _adapted("pipelines"),
    "diffusers.loaders.lora_pipeline": _adapted("pipelines"),
    "diffusers.loaders.peft": _adapted("models"),
    "diffusers.models.modeling_utils": _diffusers_models,
    "transformers.modeling_utils": _transformers_models,
}


class _Watcher(MetaPathFinder):
    """A finder that leaves the search to the other finders, and calls the ``WATCHED`` callback of a module after its
    import."""

    def __init__(self) -> None:
        self.searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WATCHED or fullname in self.searching:
            return None
        self.searching.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self.searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, WATCHED[fullname])
        return spec


class _Then(Loader):
    """A loader that calls ``then(module)`` after executing the module."""

    def __init__(self, loader: Loader, then: Callable[[ModuleType], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then(module)

    def __getattr__(self, name: str) -> Any:  # resources and source lines come from the loader
        return getattr(self.loader, name)


def register() -> None:
    """Installs the import hook, and registers with libraries imported before. May be called again."""
    if any(type(finder) is _Watcher for finder in sys.meta_path):
        return
    for name, then in WATCHED.items():
        if name in sys.modules:
            then(sys.modules[name])
    sys.meta_path.insert(0, _Watcher())
