"""Loads packages and weights that metrics need, with errors that say how to get missing ones."""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import MixDQError

EXTRA = "pip install -c constraints.txt 'mixdq-ao[evaluate]'"


def package(name: str, what_for: str) -> Any:
    """An optional package's module. Raises MixDQError saying how to install it."""
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as e:  # torchvision made for another torch raises RuntimeError
        raise MixDQError(f"{what_for} needs the package {name.split('.')[0]} ({_line(e)}); {EXTRA}") from e


def read_weights(path: Path, what_for: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises MixDQError for other formats, which can run code when they are loaded,
    and says how to convert them."""
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise MixDQError(
            f'{path}: {what_for} is read from safetensors only; convert it once: python -c "import sys, torch; '
            "from safetensors.torch import save_file; s = torch.load(sys.argv[1], weights_only=True); "
            'save_file({k: v.contiguous().clone() for k, v in s.items()}, sys.argv[2])" '
            f"{path.name} {path.stem}.safetensors"
        )
    try:
        return load_file(path)
    except Exception as e:  # safetensors raises its own class, OSError and others
        raise MixDQError(f"{path}: cannot be read: {_line(e)}; expected {what_for}") from e


def fill(module: Any, state: dict[str, Tensor], where: object) -> None:
    """Loads ``state``, which must hold every tensor of the module. Raises MixDQError naming a tensor."""
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise MixDQError(f"{where}: has no tensor for {name!r}; it holds another network")
        if state[name].shape != tensor.shape:
            raise MixDQError(
                f"{where}: {name!r} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}; it holds another "
                "network"
            )
    module.load_state_dict({name: state[name] for name in expected})


def pretrained(loader: Any, name: str, what_for: str) -> Any:
    """``loader.from_pretrained(name)``. Raises MixDQError naming the directory or the hub's model."""
    try:
        return loader.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as e:
        raise MixDQError(
            f"{name}: cannot be loaded for {what_for}: {_line(e)}; give the directory of a copy, "
            "or a name on the hub with network"
        ) from e


def digest_of(path: Path) -> str:
    """Digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
