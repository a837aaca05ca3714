"""Names of what computes layers of a model at once, or once per prompt. No file holds it, for it holds the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ..layers import JOINT_OF

Value = TypeVar("Value")

JOINT_TEXT = "text_projections"
"""The UNet's own: keys and values of the text for all its cross attentions (``fused_text``)."""
TEXT_REUSE = "text_reuse"
"""Attribute of a UNet that keeps them over calls."""


def without_joint(state: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict without what stands there a second time. Joint projections that a model has in the place of single
    ones stay."""
    return {name: value for name, value in state.items() if not _is_joint(name, state)}


def _is_joint(name: str, state: Mapping[str, object]) -> bool:
    path, parameter = name.split(".")[:-1], name.split(".")[-1]
    if path and path[0] == JOINT_TEXT:
        return True
    parts = JOINT_OF.get(path[-1] if path else "", ())
    return bool(parts) and all(".".join([*path[:-1], part, parameter]) in state for part in parts)
