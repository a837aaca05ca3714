"""Finds the weight files of a saved model, checks them against each other, and reads them without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..jsonfile import read_object
from ..tensorfile import SAVE_AGAIN, Header, read_header
from .flatten import Contents, read_contents, stored_names
from .stored_values import check_values
from .torchao_safetensors import PLAIN


class Checkpoint:
    """Headers and contents of a model's weight files. The constructor reads headers only.

    Raises:
        CheckpointError: a file is missing, damaged, cut off, foreign, newer than this release, or of another model; the
            message names it.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.headers = [read_header(file) for file in files]
        self.contents: Contents = read_contents(self.headers)
        self.where: dict[str, Header] = {}
        for header in self.headers:
            for key in header.tensors:
                if key in self.where:
                    raise CheckpointError(f"{header.path}: repeats {key!r} of {self.where[key].path}; {SAVE_AGAIN}")
                self.where[key] = header
        self._check_complete()

    def _check_complete(self) -> None:
        files = ", ".join(str(h.path) for h in self.headers)
        promised = {key for name in self.contents.names for key in self.contents.keys(name)}
        for key in sorted(promised - set(self.where)):
            raise CheckpointError(f"{files}: {key!r} is missing; {SAVE_AGAIN}")
        for key in sorted(set(self.where) - promised):
            raise CheckpointError(f"{self.where[key].path}: {key!r} belongs to no weight; {SAVE_AGAIN}")

    @classmethod
    def in_directory(cls, directory: Path, stem: str) -> Checkpoint:
        """Opens the files that a directory's index names, or else ``<stem>.safetensors``."""
        index = directory / f"{stem}.safetensors.index.json"
        single = directory / f"{stem}.safetensors"
        if not index.exists():
            return cls([single])
        if single.exists():
            raise CheckpointError(f"{directory}: holds {single.name} and {index.name}, of two saves; delete the older")
        places = _places(index)
        checkpoint = cls([directory / name for name in sorted(set(places.values()))])
        if places != {key: header.path.name for key, header in checkpoint.where.items()}:
            raise CheckpointError(f"{index}: does not list what its files hold; {SAVE_AGAIN}")
        return checkpoint

    @property
    def names(self) -> list[str]:
        """The keys of the state dict."""
        return self.contents.names

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of one entry of the state dict (for a quantized weight: its layer's), or None if the files do not
        record it. Raises CheckpointError naming the file if the recorded value is not a dtype."""
        if name in self.where:
            return self.where[name].tensors[name].dtype
        record = self.contents.records.get(stored_names(name, name in self.contents.splits)[0], PLAIN)
        given = record.get("_data", {}).get("dtype")
        if given is None:
            return None
        found = getattr(torch, str(given.get("_data")), None) if isinstance(given, dict) else None
        if not isinstance(found, torch.dtype):
            path = self.where[self.contents.keys(name)[0]].path
            raise CheckpointError(f"{path}: {name!r} is damaged: dtype is {given!r:.80}, expected a type; {SAVE_AGAIN}")
        return found

    def read(self) -> dict[str, Tensor]:
        """Reads the state dict, on the CPU. Plain tensors are views of memory-mapped files: read from disk when first
        used, copied when first written to."""
        tensors: dict[str, Tensor] = {}
        for header in self.headers:
            try:
                with safe_open(header.path, framework="pt") as file:
                    tensors.update({key: file.get_tensor(key) for key in header.tensors})
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"{header.path}: cannot be read: {e}; {SAVE_AGAIN}") from e
        return {name: self.assemble(name, tensors) for name in self.names}

    def assemble(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Builds one entry of the state dict from plain tensors by key. Raises CheckpointError naming the file."""
        try:
            found = self.contents.assemble(name, tensors)
            check_values(found)
            return found
        except (ValueError, TypeError, AttributeError, KeyError) as e:
            path = self.where[self.contents.keys(name)[0]].path
            raise CheckpointError(f"{path}: {name!r} is damaged: {e}; {SAVE_AGAIN}") from e


def _places(index: Path) -> dict[str, str]:
    """{key: name of its file} from the index of a sharded model."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{index}: has no weight_map of file names; {SAVE_AGAIN}")
    for name in places.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names the file {name!r}, expected safetensors files beside it")
    return places


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    return read_object(path, CheckpointError, f"; {SAVE_AGAIN}")
