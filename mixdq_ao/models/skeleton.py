"""Builds a model without weights from its ``config.json`` and fills in weights, without a full-precision model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

PRIVATE = ("_name_or_path", "_pre_quantization_dtype")


@dataclass(frozen=True, slots=True)
class Library:
    """How one library stores a model.

    Attributes:
        stem: the start of weight file names. base: the base class of the library's models.
        document: the model's config.
    """

    stem: str
    base: type
    document: dict[str, Any]

    def class_name(self) -> object:
        architectures = self.document.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        return self.document.get("_class_name", first)


def saved_config(model: nn.Module) -> Library:
    """The config of a diffusers or transformers model as it is saved.

    Raises:
        CheckpointError: ``model`` is of neither library, so that loading could not find its class.
    """
    from diffusers.models.modeling_utils import ModelMixin
    from transformers import PreTrainedModel

    if isinstance(model, ModelMixin):
        return _library(json.loads(model.to_json_string()))
    if isinstance(model, PreTrainedModel):
        document = json.loads(model.config.to_json_string())
        return _library({**document, "architectures": [type(model).__name__]})
    raise CheckpointError(
        f"{type(model).__name__} is neither a diffusers nor a transformers model; save its state_dict with "
        "torchao.prototype.safetensors instead, which takes MixDQTensor once mixdq_ao.models is imported"
    )


def _library(document: dict[str, Any]) -> Library:
    from diffusers.models.modeling_utils import ModelMixin
    from transformers import PreTrainedModel

    document = {k: v for k, v in document.items() if k not in PRIVATE and k != "quantization_config"}
    if "_class_name" in document:
        return Library("diffusion_pytorch_model", ModelMixin, document)
    return Library("model", PreTrainedModel, document)


def library_of(path: Path, document: dict[str, Any]) -> Library:
    """The library of a config that was read from ``path``. Raises CheckpointError if it names no model class."""
    library = _library(document)
    _model_class(path, library)
    return library


def _model_class(path: Path, library: Library) -> Any:
    """The class that a config names, looked up in its library only."""
    import diffusers
    import transformers

    name = library.class_name()
    home = diffusers if "_class_name" in library.document else transformers
    found = getattr(home, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, library.base):
        raise CheckpointError(f"{path}: names the class {name!r}, expected a model of diffusers or transformers")
    return found


def empty_model(path: Path, library: Library) -> Any:
    """The model that a config describes, with parameters on the meta device, in evaluation mode.

    Raises:
        CheckpointError: the config cannot be used.
    """
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights

    cls = _model_class(path, library)
    try:
        with no_init_weights(), init_empty_weights():
            if "_class_name" in library.document:
                model = cls.from_config(library.document)
            else:
                model = cls(cls.config_class.from_dict(library.document))
        if hasattr(model, "tie_weights"):
            model.tie_weights()
    except Exception as e:  # constructors may raise anything for values that we cannot check
        raise CheckpointError(
            f"{path}: {cls.__name__} cannot be built from it: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
        ) from e
    return model.eval()


def check_fit(where: object, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless ``state`` has exactly the tensors of ``model``, in their shapes. One name of tied
    parameters suffices."""
    slots = model.state_dict(keep_vars=True)
    filled = {id(slots[name]) for name in state if name in slots}
    name_of = type(model).__name__
    for name in state:
        if name not in slots:
            raise CheckpointError(f"{where}: holds {name!r}, which {name_of} does not have; is it of another model?")
    for name, slot in slots.items():
        if id(slot) not in filled:
            raise CheckpointError(f"{where}: lacks {name!r} of {name_of}; save the model again")
        if name in state and state[name].shape != slot.shape:
            raise CheckpointError(
                f"{where}: {name!r} has shape {list(state[name].shape)}, {name_of} expects {list(slot.shape)}"
            )


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replaces parameters and buffers by the tensors of ``state``, without copies; tied ones everywhere."""
    slots: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    new = {id(slots[name]): _like(slots[name], tensor) for name, tensor in state.items()}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, old in table.items():
                if id(old) in new:
                    table[key] = new[id(old)]  # type: ignore[assignment]


def _like(slot: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(slot, nn.Parameter):
        return tensor
    plain = type(tensor) is Tensor and torch.is_floating_point(tensor)
    return nn.Parameter(tensor, requires_grad=plain and slot.requires_grad)


def without_aliases(model: nn.Module) -> dict[str, Any]:
    """The state dict with only the first name of tied parameters."""
    seen: dict[int, str] = {}
    for name, slot in model.state_dict(keep_vars=True).items():
        seen.setdefault(id(slot), name)
    first = set(seen.values())
    return {name: slot for name, slot in model.state_dict().items() if name in first}
