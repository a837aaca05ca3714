"""What measurements depend on, as a hash: a pipeline with all its parts, and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..models.pipelines import denoiser


def fingerprint(subject: Any, settings: Mapping[str, Any]) -> str:
    """A hash of ``settings`` (JSON) and of a model or a pipeline: of all its components, parameters and buffers of
    modules (names, types, shapes, bytes) and configs of those that have one (schedulers, models)."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for name, part in _parts(subject).items():
        config = getattr(part, "config", None)
        if isinstance(config, Mapping):  # names with "_" say where a part came from
            public = {key: value for key, value in config.items() if not key.startswith("_")}
            text = json.dumps(public, sort_keys=True, default=lambda value: type(value).__name__)
            digest.update(f"{name} {type(part).__name__}{text}".encode())
        if isinstance(part, nn.Module):
            _add_values(digest, name, part)
    return digest.hexdigest()


def _parts(subject: Any) -> dict[str, Any]:
    """Components by name, in one order."""
    if isinstance(subject, nn.Module):
        return {"": subject}
    components = getattr(subject, "components", None)
    return dict(sorted(components.items())) if isinstance(components, Mapping) else {"": denoiser(subject)}


def _add_values(digest: Any, prefix: str, model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        digest.update(f"{prefix} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
