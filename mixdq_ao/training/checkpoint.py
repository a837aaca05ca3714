"""Checks whether a saved state fits an optimizer, completely, before any of it is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import OptimizerError
from .clip import STATE as GRAD_SQUARE


@dataclass(frozen=True)
class Ready:
    """A checked copy of a parameter's state; not a dict, since torch would cast the tensors in it."""

    tensors: dict[str, Any]


def checked(
    state_dict: Any,
    groups: list[dict[str, Any]],
    names: Callable[[Tensor], str],
    check_group: Callable[[Mapping[str, Any], str], None],
    states: Callable[[Tensor, Mapping[str, Any], Mapping[str, Any]], tuple[dict[str, Any], Collection[str]]],
) -> dict[str, Any]:
    """A copy of a state dict with ``Ready`` states.

    Args:
        state_dict: from ``Optimizer.state_dict``, possibly saved and loaded since.
        groups: the optimizer's groups.
        names: the name of a parameter for errors.
        check_group: called with a group's options and their origin; raises for options out of range.
        states: called with a parameter, its group's options and its saved state; returns a fresh state with everything
            that the saved one may hold, and the names that may be absent.

    Raises:
        OptimizerError: naming the parameter or the option, what was found and what was expected.
    """
    saved = _saved_groups(state_dict, groups)
    ready: dict[Any, Any] = {}
    for i, (group, options) in enumerate(zip(groups, saved, strict=True)):
        _check_options(options, group, f"param_groups[{i}] of the checkpoint")
        check_group(options, f"param_groups[{i}] of the checkpoint")
        for p, key in zip(group["params"], options["params"], strict=True):
            state = state_dict["state"].get(key, {})
            if not isinstance(state, Mapping):
                found = type(state).__name__
                raise OptimizerError(f"{names(p)}: the checkpoint's state is a {found}, expected a dict")
            if state:  # empty if it was accessed before the parameter's first step
                ready[key] = Ready(_fitted(state, *states(p, options, state), names(p)))
    return {"state": ready, "param_groups": saved}


def _saved_groups(state_dict: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries = isinstance(state_dict, Mapping) and {"state", "param_groups"} <= set(state_dict)
    if not entries or not isinstance(state_dict["state"], Mapping):
        raise OptimizerError("the checkpoint is not an optimizer's state dict: expected 'state' and 'param_groups'")
    saved = state_dict["param_groups"]
    if not isinstance(saved, list) or not all(isinstance(g, Mapping) and "params" in g for g in saved):
        raise OptimizerError("the checkpoint's param_groups are not a list of groups with 'params'")
    sizes, expected = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if sizes != expected:
        raise OptimizerError(f"the checkpoint has groups of {sizes} parameters, this optimizer of {expected}")
    known = {key for g in saved for key in g["params"]}
    if extra := [key for key in state_dict["state"] if key not in known]:
        raise OptimizerError(f"the checkpoint has state for parameters that are in no group: {extra[:3]}")
    return [dict(g) for g in saved]


def _check_options(options: Mapping[str, Any], group: Mapping[str, Any], where: str) -> None:
    missing = {k for k in group if k not in ("param_names", "initial_lr")} - set(options)
    if missing:
        raise OptimizerError(f"{where}: lacks {', '.join(sorted(missing))}; was it saved by another kind of optimizer?")


def _fitted(state: Mapping[str, Any], fresh: dict[str, Any], optional: Collection[str], name: str) -> dict[str, Any]:
    """``fresh`` with the values of ``state``, without the ``optional`` entries that ``state`` lacks."""
    if GRAD_SQUARE in state:
        fresh = {**fresh, GRAD_SQUARE: torch.zeros((), dtype=torch.float64)}
    fresh = {key: value for key, value in fresh.items() if key in state or key not in optional}
    if set(state) != set(fresh):
        raise OptimizerError(
            f"{name}: the checkpoint holds {_list(state)}, expected {_list(fresh)}; "
            "was it saved from parameters of another dtype, or by another kind of optimizer?"
        )
    for key, value in state.items():
        _check_tensor(value, fresh[key], f"{name}: {key}")
    for key in ("step", GRAD_SQUARE):
        if key in state and not 0 <= float(state[key]) < math.inf:
            raise OptimizerError(f"{name}: {key} is {float(state[key])} in the checkpoint, expected a number from 0 up")
    for key, value in state.items():
        fresh[key].copy_(value)
    return fresh


def _check_tensor(value: Any, like: Tensor, what: str) -> None:
    found, expected = (_describe(v) for v in (value, like))
    if found != expected:
        raise OptimizerError(f"{what}: {found} in the checkpoint, expected {expected}; nothing was loaded")


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape = f"{list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, DTensor):
        return f"{shape}, sharded {value.placements} as {_describe(value.to_local())}"
    return shape if type(value) is Tensor else f"{shape} in a {type(value).__name__}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names))) or "nothing"
