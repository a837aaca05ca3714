"""Losses on the outputs of a denoiser's blocks, called with the teacher's inputs or within the whole student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import tree_leaves
from .recover_layers import students


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def find_blocks(model: nn.Module) -> list[str]:
    """Names of blocks that together contain every quantized layer once: the innermost items of module lists with two or
    more quantized layers (resnets, transformer blocks), and the quantized layers outside of these."""
    layers = [name for name, _ in students(model)]
    within = {n: sum(layer.startswith(f"{n}.") for layer in layers) for n, _ in model.named_modules() if n}
    items = {n for n, count in within.items() if count >= 2 and n.rpartition(".")[2].isdigit()}
    smallest = [n for n in items if not any(other.startswith(f"{n}.") for other in items)]
    inside = tuple(f"{n}." for n in smallest)
    chosen = set(smallest) | {n for n in layers if not n.startswith(inside)}
    return [n for n, _ in model.named_modules() if n in chosen]


@contextmanager
def recorded_calls(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Call]]]:
    """Records the calls of the named modules inside the block: {name: calls, in order}."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name, found in calls.items():
            hook = partial(_append_call, found)
            stack.enter_context(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        yield calls


def _append_call(found: list[Call], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    found.append(Call(args, kwargs, output))


def alone(model: nn.Module, lessons: dict[str, list[Call]]) -> Tensor:
    """Mean relative error power of the blocks of ``model``, each called with its teacher's arguments."""
    errors = []
    for name, calls in lessons.items():
        block = model.get_submodule(name)
        errors += [relative_error(block(*call.args, **call.kwargs), call.output) for call in calls]
    return torch.stack(errors).mean()


def together(outputs: dict[str, list[Call]], lessons: dict[str, list[Call]]) -> Tensor:
    """Mean relative error power of the blocks' outputs in a call of the whole model."""
    pairs = [(a, b) for name in lessons for a, b in zip(outputs[name], lessons[name], strict=True)]
    return torch.stack([relative_error(a.output, b.output) for a, b in pairs]).mean()


def relative_error(output: Any, target: Any) -> Tensor:
    """sum (y - t)^2 / sum t^2 over all tensors of an output."""
    ys, ts = ([t for t in tree_leaves(o) if isinstance(t, Tensor)] for o in (output, target))
    noise = sum(((y.float() - t.float()).square().sum() for y, t in zip(ys, ts, strict=True)), torch.zeros(()))
    power = sum((t.float().square().sum() for t in ts), torch.zeros(()))
    return noise / power.clamp(min=1e-30)
