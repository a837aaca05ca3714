"""A hash of everything that measurements depend on: a pipeline with all its components, and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import is_traceable_wrapper_subclass
from .watch import model_of


def fingerprint(subject: Any, settings: Mapping[str, Any]) -> str:
    """A hash of ``settings`` (JSON) and of a model or pipeline: names, dtypes, shapes and bytes of all parameters and
    buffers (for quantized tensors their stored tensors and attributes), and configs of the components that have one.
    ``torch.compile`` wrappers are ignored."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for name, part in _parts(subject).items():
        config = getattr(part, "config", None)
        if isinstance(config, Mapping):  # keys with "_" are about the component's origin
            public = {key: value for key, value in config.items() if not key.startswith("_")}
            text = json.dumps(public, sort_keys=True, default=lambda value: type(value).__name__)
            digest.update(f"{name} {type(part).__name__}{text}".encode())
        if isinstance(part, nn.Module):
            for key, tensor in part.state_dict().items():
                _add_values(digest, f"{name} {key}", tensor)
    return digest.hexdigest()


def _parts(subject: Any) -> dict[str, Any]:
    """Components by name, sorted."""
    components = getattr(subject, "components", None)
    if isinstance(subject, nn.Module) or not isinstance(components, Mapping):
        return {"": model_of(subject)}
    return {n: model_of(p) if isinstance(p, nn.Module) else p for n, p in sorted(components.items())}


def _add_values(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    if is_traceable_wrapper_subclass(tensor):  # a quantized weight, whose values are in inner tensors
        held, attributes = tensor.__tensor_flatten__()
        digest.update(f"{type(tensor).__name__}{attributes}".encode())
        for part in held:
            _add_values(digest, f"{name}.{part}", getattr(tensor, part))
        return
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest.update(raw.numpy().data)
