"""Second moments on disk: a safetensors file with each matrix once, and the layers that share it in the header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CalibrationError, CheckpointError
from ..tensorfile import Header, read_header, write_safetensors

FORMAT, VERSION = "mixdq-moments", "1"
AGAIN = "collect moments again"


def fingerprint_of(matrices: Mapping[str, Tensor]) -> str:
    """A hash of names, sizes and diagonals, which differs for other prompts, models or layers."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(matrices):
        digest.update(f"{name} {tuple(matrices[name].shape)}".encode())
        digest.update(matrices[name].diagonal().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_moments(path: str | os.PathLike[str], matrices: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes float32 matrices; after a crash the file is either the old or the complete new one."""
    path = Path(path)
    owners: dict[int, str] = {}
    layers = {name: owners.setdefault(id(matrix), name) for name, matrix in matrices.items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "layers": json.dumps(layers),
        "metadata": json.dumps(dict(metadata)),
        "fingerprint": fingerprint_of(matrices),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, {owner: matrices[owner] for owner in owners.values()}, header)
    except OSError as e:
        raise CalibrationError(f"{path}: cannot be written: {e.strerror or e}; make room and save again") from e


def read_moments(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The matrices by layer, memory-mapped, and the metadata. Raises CalibrationError."""
    path = Path(path)
    try:
        header = read_header(path)
        layers, metadata = _documents(header)
        with safe_open(path, framework="pt") as file:
            stored = {owner: file.get_tensor(owner) for owner in header.tensors}
    except (CheckpointError, SafetensorError, OSError) as e:
        raise CalibrationError(f"{e}" if isinstance(e, CheckpointError) else f"{path}: cannot be read: {e}") from e
    matrices = {name: stored[owner] for name, owner in layers.items()}
    if fingerprint_of(matrices) != header.metadata.get("fingerprint"):
        raise CalibrationError(f"{path}: its matrices are not those it was written with; {AGAIN}")
    return matrices, metadata


def _documents(header: Header) -> tuple[dict[str, str], dict[str, Any]]:
    """{layer: name of its matrix} and the metadata, checked against the tensors of the file."""
    path, given = header.path, header.metadata
    if given.get("format") != FORMAT or given.get("version") != VERSION:
        raise CalibrationError(
            f"{path}: format is {given.get('format')!r}, version {given.get('version')!r}, expected {FORMAT!r}, "
            f"{VERSION!r}; upgrade mixdq-ao if the file is newer"
        )
    try:
        layers, metadata = json.loads(given.get("layers", "")), json.loads(given.get("metadata", ""))
    except (ValueError, RecursionError) as e:
        raise CalibrationError(f"{path}: layers or metadata are not valid JSON; {AGAIN}") from e
    if not isinstance(metadata, dict) or not isinstance(layers, dict):
        raise CalibrationError(f"{path}: layers and metadata are expected to be objects; {AGAIN}")
    for name, owner in layers.items():
        if not isinstance(owner, str) or owner not in header.tensors:
            raise CalibrationError(f"{path}: layer {name!r} has the matrix {owner!r}, which the file lacks; {AGAIN}")
    if unused := set(header.tensors) - set(layers.values()):
        raise CalibrationError(f"{path}: the matrix {min(unused)!r} belongs to no layer; {AGAIN}")
    for owner, stored in header.tensors.items():
        if stored.dtype != torch.float32 or len(stored.shape) != 2 or stored.shape[0] != stored.shape[1]:
            raise CalibrationError(
                f"{path}: the matrix {owner!r} is {stored.dtype} of shape {list(stored.shape)}, expected float32, "
                f"square; {AGAIN}"
            )
    return layers, metadata
