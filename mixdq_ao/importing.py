"""Reading the MixDQ authors' files: flat YAML with one ``model.<layer>: value`` per line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import MixDQError, PlanError
from .layer_plan import ACT_BITS, WEIGHT_BITS, LayerPlan
from .textfile import read_text

PathLike = str | os.PathLike[str]


MAX_DEPTH = 2
"""Layers map to numbers or to lists of numbers."""

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _UniqueKeyLoader(_SafeLoader):
    """PyYAML's safe loader, except that repeated keys are errors (it would silently keep the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, n in counts.items() if n > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_layer_map(path: PathLike, error: type[MixDQError]) -> dict[str, Any]:
    """{layer name: value} of a flat YAML file; names lose a leading ``model.``. Values are not looked at.

    Raises ``error`` naming the file when it cannot be read, is not YAML, is not a map, is empty, repeats a layer,
    or has a key that is not a string.
    """
    path = Path(path)
    text = read_text(path, error)
    try:
        _check_depth(text)
        document = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, RecursionError) as e:
        raise error(
            f"{path}: not valid YAML ({' '.join(str(e).split())}); expected lines 'model.<layer>: value'"
        ) from e
    if not isinstance(document, dict) or not document:
        found = "empty" if not document else type(document).__name__
        raise error(f"{path}: is {found}, expected lines 'model.<layer>: value'")
    layers: dict[str, Any] = {}
    for key, value in document.items():
        if not isinstance(key, str):
            raise error(f"{path}: key {shown(key)} is {type(key).__name__}, expected a layer name")
        name = key.removeprefix("model.")
        if name in layers:
            raise error(f"{path}: layer {name!r} appears twice, with and without 'model.'")
        layers[name] = value
    return layers


def shown(value: object) -> str:
    """``value`` for an error message, at most 60 characters (an integer of 4300 digits cannot even be printed)."""
    try:
        text = repr(value)
    except ValueError:
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _check_depth(text: str) -> None:
    """Raises ValueError for deep nesting before the document is built: libyaml's recursion would overflow the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            raise ValueError("nested or aliased values where a flat map was expected")


def read_mixdq_plan(
    weight: PathLike, act: PathLike | None = None, protect: Iterable[str] = ()
) -> tuple[dict[str, LayerPlan], dict[str, Any]]:
    """Layers and metadata of a Plan, from a published weight plan and, optionally, an activation plan.

    Weights of 2 and 4 bits are asymmetric, as the published plans were measured; 8 bits symmetric. Without ``act``
    every activation stays at 16 bits; with it, a layer it does not name keeps a 16-bit activation and its weight
    bits. Layers named in ``protect`` keep 16 bits in both. Raises PlanError naming file and layer.
    """
    protected = {name.removeprefix("model.") for name in _names(protect)}
    weights = _read_bits(weight, WEIGHT_BITS)
    acts = {} if act is None else _read_bits(act, ACT_BITS)
    for names, what in ((set(acts), f"{act}: layer"), (protected, "protect: layer")):
        if unknown := names - set(weights):
            raise PlanError(f"{what} {min(unknown)!r} has no weight bits in {weight}; expected one of its layers")
    layers = {
        name: LayerPlan() if name in protected else LayerPlan(weight_bits=bits, act_bits=acts.get(name, 16))
        for name, bits in weights.items()
    }
    return layers, _metadata(layers, weight, act, protected)


def _names(protect: Iterable[str]) -> list[str]:
    names = [protect] if isinstance(protect, str) else list(protect)
    for name in names:
        if not isinstance(name, str):
            raise PlanError(f"protect: {name!r} is {type(name).__name__}, expected a layer name")
    return names


def _read_bits(path: PathLike, offered: tuple[int, ...]) -> dict[str, int]:
    layers = read_layer_map(path, PlanError)
    for name, bits in layers.items():
        if type(bits) is not int or bits not in offered:
            expected = ", ".join(map(str, offered))
            raise PlanError(f"{os.fspath(path)}: layer {name!r}: bits is {shown(bits)}, expected one of {expected}")
    return layers


def _metadata(
    layers: Mapping[str, LayerPlan], weight: PathLike, act: PathLike | None, protected: set[str]
) -> dict[str, Any]:
    def count(bits: Iterable[int]) -> dict[str, int]:
        return {str(b): n for b, n in sorted(Counter(bits).items())}

    return {
        "source": "MixDQ YAML",
        "weight_file": Path(weight).name,
        "act_file": None if act is None else Path(act).name,
        "weight_counts": count(layer.weight_bits for layer in layers.values()),
        "act_counts": count(layer.act_bits for layer in layers.values()),
        "protected": sorted(protected),
    }
