"""The contents of weight files: quantized weights as plain tensors and JSON metadata, and back.

The form is torchao's (``torchao_safetensors.py``), so torchao's helpers read the files too; a split weight is stored
as two weights, ``<name>.first`` and ``<name>.second``. Under "mixdq" each file's metadata also has our format, its
version, and the names of split weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from ..errors import CheckpointError
from ..jsonfile import parse
from ..quantize.tensor import MixDQTensor, SplitMixDQTensor
from ..tensorfile import SAVE_AGAIN, Header
from .torchao_safetensors import MIXDQ_ATTRIBUTES, PLAIN, Record, known, part_key, rebuild, record_of

FORMAT, VERSION, MARK = "mixdq-checkpoint", 2, "mixdq"
HALVES = ("first", "second")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Flat:
    """A state dict without subclasses.

    Attributes:
        tensors: plain tensors by key, not copied; weights may share a BOS embedding.
        records: class and attributes of each stored weight or plain tensor.
        groups: {name in the state dict: keys of its plain tensors}.
        splits: names of split weights; each half has its own record.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    splits: list[str] = field(default_factory=list)

    def metadata(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """The safetensors metadata of a file that holds ``names`` of the state dict (None: all)."""
        names = list(self.groups if names is None else names)
        split = set(self.splits) & set(names)
        stored = [s for n in names for s in stored_names(n, n in split)]
        return {
            "format": "pt",
            MARK: json.dumps({"format": FORMAT, "version": VERSION, "split": sorted(split)}),
            "tensor_names": json.dumps(stored),
            **{s: json.dumps(self.records[s]) for s in stored},
        }


def flatten(state: Mapping[str, Any]) -> Flat:
    """Splits the tensor subclasses of a state dict into plain tensors and records.

    Raises:
        CheckpointError: an entry is not a tensor, or a subclass without a safetensors form.
    """
    flat = Flat()
    for name, value in state.items():
        split = isinstance(value, SplitMixDQTensor)
        if split:
            flat.splits.append(name)
        keys = flat.groups.setdefault(name, [])
        for stored, tensor in zip(stored_names(name, split), _halves(value), strict=True):
            record, parts = _taken_apart(stored, tensor)
            flat.records[stored] = record
            flat.tensors.update(parts)
            keys.extend(parts)
    return flat


def stored_names(name: str, split: bool) -> list[str]:
    """The names that a weight is stored under: its own, or those of its halves."""
    return [f"{name}.{half}" for half in HALVES] if split else [name]


def _halves(value: Any) -> list[Any]:
    return [value.first, value.second] if isinstance(value, SplitMixDQTensor) else [value]


def _taken_apart(name: str, value: Any) -> tuple[Record, dict[str, Tensor]]:
    if isinstance(value, Tensor) and value.is_meta:
        raise CheckpointError(f"{name!r} is on the meta device; take the model out of offloading before saving it")
    if type(value) in (Tensor, nn.Parameter):
        return PLAIN, {name: value}
    if isinstance(value, TorchAOBaseTensor) and known(type(value).__name__):
        record, parts = record_of(value)
        return record, {part_key(name, attribute): tensor for attribute, tensor in parts.items()}
    raise CheckpointError(
        f"{name!r} is a {type(value).__name__}, which has no safetensors form; expected a plain tensor, a MixDQTensor, "
        "or a tensor of torchao's that torchao.prototype.safetensors covers"
    )


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of weight files according to their metadata: records by stored name, and names of split weights."""

    records: Mapping[str, Record]
    splits: frozenset[str]

    @property
    def names(self) -> list[str]:
        """The keys of the state dict."""
        halves = {s: n for n in self.splits for s in stored_names(n, True)}
        return list(dict.fromkeys(halves.get(s, s) for s in self.records))

    def keys(self, name: str) -> list[str]:
        """The keys of the plain tensors of one entry of the state dict."""
        return [k for s in stored_names(name, name in self.splits) for k in _keys(s, self.records[s]).values()]

    def assemble(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Builds one entry of the state dict from plain tensors by key, without copies.

        Raises:
            ValueError, TypeError, AttributeError, KeyError: the tensors do not fit together.
        """
        halves = [_put_together(s, self.records[s], tensors) for s in stored_names(name, name in self.splits)]
        return halves[0] if len(halves) == 1 else _joined(*halves)


def read_contents(headers: Sequence[Header]) -> Contents:
    """Reads the contents of a model's weight files from their headers.

    Raises:
        CheckpointError: a file is not ours, is newer than this release, or the files contradict each other.
    """
    records: dict[str, Record] = {}
    splits: set[str] = set()
    for header in headers:
        path, metadata = header.path, header.metadata
        if MARK not in metadata:
            raise CheckpointError(
                f"{path}: holds no model quantized by mixdq_ao; load it with from_pretrained, or quantize it first"
            )
        try:
            mark = parse(metadata[MARK])
            check_version(path, mark)
            own = {name: _record(metadata[name]) for name in _names(parse(metadata["tensor_names"]))}
            splits.update(_names(mark["split"]))
        except (ValueError, KeyError) as e:
            if isinstance(e, CheckpointError):
                raise
            raise CheckpointError(f"{path}: has damaged metadata: {str(e)[:200]}; {SAVE_AGAIN}") from e
        for name, record in own.items():
            if records.setdefault(name, record) != record:
                raise CheckpointError(f"{path}: contradicts another file about {name!r}; {SAVE_AGAIN}")
    missing = [s for n in splits for s in stored_names(n, True) if s not in records]
    if missing:
        files = ", ".join(str(header.path) for header in headers)
        raise CheckpointError(f"{files}: the half {min(missing)!r} of a split weight is missing; {SAVE_AGAIN}")
    return Contents(records, frozenset(splits))


def check_version(path: object, document: Any) -> None:
    """Raises CheckpointError unless ``document`` has our format and this version."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise CheckpointError(f"{path}: format is {found!r}, expected {FORMAT!r}; {SAVE_AGAIN}")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise CheckpointError(
            f"{path}: version is {document.get('version')!r}, this release reads version {VERSION}; "
            "upgrade mixdq-ao for a newer file, quantize the model again for an older one"
        )


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(n, str) for n in value) or len(set(value)) < len(value):
        raise ValueError("expected a list of different names")
    return value


def _record(text: str) -> Record:
    record = parse(text)
    kind = record.get("_type") if isinstance(record, dict) else None
    if kind == PLAIN["_type"]:
        return PLAIN
    if not isinstance(kind, str) or not known(kind):
        raise ValueError(f"a tensor of class {kind!r}, which this release of mixdq_ao and torchao does not know")
    if set(record) != {"_type", "_data", "_tensor_data_names"} or not isinstance(record["_data"], dict):
        raise ValueError(f"an incomplete record of a {kind}")
    _names(record["_tensor_data_names"])
    return record


def _keys(stored: str, record: Record) -> dict[str, str]:
    """{attribute: key} of a stored weight; a plain tensor has the one attribute ""."""
    if record is PLAIN:
        return {"": stored}
    return {attribute: part_key(stored, attribute) for attribute in record["_tensor_data_names"]}


def _put_together(stored: str, record: Record, tensors: Mapping[str, Tensor]) -> Tensor:
    parts = {attribute: tensors[key] for attribute, key in _keys(stored, record).items()}
    if record is PLAIN:
        return parts[""]
    if record["_type"] == MixDQTensor.__name__:
        _check_mixdq(record["_data"], parts)
    return rebuild(record, parts)


def _joined(first: Tensor, second: Tensor) -> SplitMixDQTensor:
    if not isinstance(first, MixDQTensor) or not isinstance(second, MixDQTensor):
        raise ValueError("its halves are no MixDQTensor")
    if first.dtype != second.dtype or first.dim() != 4 or _but_channels(first) != _but_channels(second):
        raise ValueError(f"its halves do not fit: {first!r} and {second!r}")
    return SplitMixDQTensor(first, second, first.dtype)


def _but_channels(weight: Tensor) -> tuple[int, ...]:
    return (weight.shape[0], *weight.shape[2:])


def _check_mixdq(data: dict[str, Any], parts: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless attributes and parts fit MixDQTensor's docstring."""
    bits, length, levels = data.get("bits"), data.get("length"), data.get("act_levels")
    dtype = getattr(torch, str(data.get("dtype", {}).get("_data")), None)
    _expect(set(data) == set(MIXDQ_ATTRIBUTES), "attributes", sorted(data), "those of a MixDQTensor")
    _expect(type(bits) is int and bits in (2, 4, 8), "bits", bits, "2, 4 or 8")
    _expect(type(length) is int and length > 0, "length", length, "a positive number")
    _expect(levels is None or (type(levels) is int and levels in (15, 255)), "act_levels", levels, "15, 255 or null")
    _expect(isinstance(dtype, torch.dtype) and dtype.is_floating_point, "dtype", data["dtype"], "a floating-point type")
    assert type(bits) is int and type(length) is int and isinstance(dtype, torch.dtype)
    wanted = {"qdata", "scale"} | ({"weight_zero_point"} if bits < 8 else set())
    wanted |= {"act_scale", "act_inv_scale", "act_zero_point"} if levels is not None else set()
    wanted |= {"bos_embedding", "bos_output"} & set(parts)
    optional = {"weight_sum"} if levels is not None else set()
    pair = len({"bos_embedding", "bos_output"} & set(parts)) != 1
    _expect(pair and wanted <= set(parts) <= wanted | optional, "tensors", sorted(parts), ", ".join(sorted(wanted)))
    stored = tuple(parts["qdata"].shape)
    _expect(len(stored) in (2, 4) and stored[-1] == ceil(length * bits / 8), "qdata", stored, f"rows of {length}")
    rows = stored[0]
    forms: dict[str, tuple[torch.dtype, Shape]] = {
        "qdata": (torch.int8 if bits == 8 else torch.uint8, stored),
        "scale": (torch.float32, (rows,)),
        "weight_zero_point": (torch.int8, (rows,)),
        "weight_sum": (torch.int32, (rows,)),
        "act_scale": (torch.float32, ()),
        "act_inv_scale": (torch.float32, ()),
        "act_zero_point": (torch.int32, ()),
        "bos_embedding": (torch.float32, (length,)),
        "bos_output": (dtype, (rows,)),
    }
    for name, tensor in parts.items():
        kind, shape = forms[name]
        found = f"{tensor.dtype} {list(tensor.shape)}"
        _expect(tensor.dtype == kind and tensor.shape == shape, name, found, f"{kind} {list(shape)}")


def _expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}, expected {expected}")
