"""diffusers, transformers and peft learn of quantized weights as soon as both they and we are imported, in any order.

    import mixdq_ao
    pipe = DiffusionPipeline.from_pretrained("saved-quantized-pipeline")

Importing ``mixdq_ao`` imports none of them: their modules are watched for, and what is put into their tables then only
stands for our classes, which are imported when the tables are asked for them.
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
    """Stands for a name of ours in a module that is imported when the name is first used."""

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
    def fill(module: ModuleType) -> None:
        module.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, Lazy("models.diffusers_quantizer", "MixDQConfig"))
        module.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, Lazy(home, quantizer))

    return fill


ATTACH = Lazy("models.diffusers_quantizer", "attach_quantizer")
DECLARE = Lazy("models.prepared_quantizer", "declare_prepared")
QUANTIZED: set[Lazy] = set()
"""Called with a model that has just been quantized, and its plan: the library it is of learns to save it."""
PREPARED: set[Lazy] = set()
"""Called with a model that has just been prepared for the levels of a schedule: its library learns that it cannot."""


def _diffusers_models(module: ModuleType) -> None:
    QUANTIZED.add(ATTACH)
    PREPARED.add(DECLARE)


def _transformers_models(module: ModuleType) -> None:
    QUANTIZED.add(ATTACH)


def is_ours(weight: object) -> bool:
    """Whether a tensor is a quantized weight, told by name: nothing is imported."""
    return type(weight).__name__ in ("MixDQTensor", "SplitMixDQTensor")


def _adapters(module: ModuleType) -> None:
    """peft takes every tensor of torchao's kind for the weight of an nn.Linear; ours go to layers of our own."""
    theirs = module.dispatch_torchao

    def dispatch_torchao(target: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        layer = getattr(target, "base_layer", target)
        if is_ours(getattr(layer, "weight", None)) or getattr(layer, "folded", False):
            from .models.lora import adapted_layer

            return adapted_layer(target, adapter_name, *args, **kwargs)
        return theirs(target, adapter_name, *args, **kwargs)

    module.dispatch_torchao = dispatch_torchao  # type: ignore[attr-defined]


def _adapted(kind: str) -> Callable[[ModuleType], None]:
    """Pipelines find the adapters of models that ``torch.compile`` has wrapped; models refuse useless ones."""
    return lambda module: getattr(import_module(".models.lora_compiled", __package__), f"watch_{kind}")(module)


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
    """Lets the ordinary finders find a watched module, and has ``WATCHED`` called when it is imported."""

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
    """A loader, and what is done to the module afterwards."""

    def __init__(self, loader: Loader, then: Callable[[ModuleType], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then(module)

    def __getattr__(self, name: str) -> Any:  # resources, source lines: the loader's own
        return getattr(self.loader, name)


def register() -> None:
    """Called when ``mixdq_ao`` is imported; may be called again."""
    if any(type(finder) is _Watcher for finder in sys.meta_path):
        return
    for name, then in WATCHED.items():
        if name in sys.modules:
            then(sys.modules[name])
    sys.meta_path.insert(0, _Watcher())
