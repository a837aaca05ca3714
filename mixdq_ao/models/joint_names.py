"""Attribute names of modules that share other layers' weights (joint projections, caches); state dicts leave them
out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ..layers import JOINT_OF

Value = TypeVar("Value")

JOINT_TEXT = "text_projections"
"""Attribute of a UNet: the joint product of all its cross attentions' keys and values of the text (``fused_text``)."""
TEXT_REUSE = "text_reuse"
"""Attribute of a UNet: the cache of these keys and values over calls (``text_reuse``)."""


def without_joint(state: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict without joint projections whose layers it contains too. Joint projections that replace single ones
    stay."""
    return {name: value for name, value in state.items() if not _is_joint(name, state)}


def _is_joint(name: str, state: Mapping[str, object]) -> bool:
    path, parameter = name.split(".")[:-1], name.split(".")[-1]
    if path and path[0] == JOINT_TEXT:
        return True
    parts = JOINT_OF.get(path[-1] if path else "", ())
    return bool(parts) and all(".".join([*path[:-1], part, parameter]) in state for part in parts)
