"""safetensors files: headers are fully checked before use, and tensors are written one by one without a copy of all.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of a JSON header, the header
{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {text: text}}, then the bytes of the tensors without a gap.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomicfile import replacing
from .errors import CheckpointError
from .jsonfile import parse

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, the bound of the reference implementation
SAVE_AGAIN = "save the model again, or fetch the file again"


@dataclass(frozen=True, slots=True)
class Stored:
    """The entry of one tensor: dtype, shape, and its bytes [begin, end) after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The checked header of one file."""

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks the header of a safetensors file; no tensor is read.

    Raises:
        CheckpointError: the file is missing, is no safetensors file, is damaged, or is cut off.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing or no regular file; {SAVE_AGAIN}")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run git lfs pull")
            if len(start) < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise CheckpointError(
                    f"{path}: is no whole safetensors file: {size} bytes, header of {length}; {SAVE_AGAIN}"
                )
            text = file.read(length)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    try:
        document = parse(text.decode("utf-8"))
        tensors, metadata = _parse(document)
        _check_layout(tensors, size - 8 - length)
    except ValueError as e:
        raise CheckpointError(f"{path}: has a damaged header: {_short(e)}; {SAVE_AGAIN}") from e
    return Header(path, tensors, metadata)


def _parse(document: object) -> tuple[dict[str, Stored], dict[str, str]]:
    if not isinstance(document, dict):
        raise ValueError(f"it is a {type(document).__name__}, expected an object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is no object of texts")
    return {name: _entry(name, value) for name, value in document.items()}, metadata


def _entry(name: str, value: Any) -> Stored:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r}: dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r}: shape is {shape!r} and data_offsets are {offsets!r}")
    return Stored(DTYPES[dtype], tuple(shape), *offsets)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_layout(tensors: Mapping[str, Stored], size: int) -> None:
    """Raises ValueError unless every tensor has the bytes of its shape and all fill the file without gap or overlap."""
    position = 0
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if t.begin != position or t.end - t.begin != prod(t.shape) * t.dtype.itemsize:
            raise ValueError(
                f"tensor {name!r}: bytes {t.begin} to {t.end} do not hold {t.dtype} of shape {list(t.shape)} "
                f"after byte {position}"
            )
        position = t.end
    if position != size:
        raise ValueError(f"the tensors need {position} bytes and the file has {size} of them")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes plain tensors one at a time and replaces ``path`` atomically.

    Larger element types come first, so that every tensor is aligned to its element size. Tensors that share memory are
    each written in full.

    Raises:
        CheckpointError: the format has no such dtype.
        OSError: the file cannot be written.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in ordered:
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"tensor {name!r}: safetensors has no type for {tensor.dtype}")
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise CheckpointError(f"{path}: a header of {len(text)} bytes; give a smaller max_shard_size")
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a plain tensor, copied only if it is not contiguous or not on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
