"""Blocks of a denoiser as lessons of their own: what each must give for its teacher's input, or on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    """Names of the smallest items of module lists with two quantized layers or more (resnets, transformer blocks), and
    of the quantized layers outside of those. Together they hold every quantized layer once."""
    layers = [name for name, _ in students(model)]
    within = {n: sum(layer.startswith(f"{n}.") for layer in layers) for n, _ in model.named_modules() if n}
    items = {n for n, count in within.items() if count >= 2 and n.rpartition(".")[2].isdigit()}
    smallest = [n for n in items if not any(other.startswith(f"{n}.") for other in items)]
    inside = tuple(f"{n}." for n in smallest)
    chosen = set(smallest) | {n for n in layers if not n.startswith(inside)}
    return [n for n, _ in model.named_modules() if n in chosen]


@contextmanager
def watched(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Call]]]:
    """The calls of these modules while the block runs."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name, found in calls.items():

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, found: list[Call] = found) -> None:
                found.append(Call(args, kwargs, output))

            handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


def alone(model: nn.Module, lessons: dict[str, list[Call]]) -> Tensor:
    """Mean relative error power of the blocks of ``model``, each called as its teacher was."""
    errors = []
    for name, calls in lessons.items():
        block = model.get_submodule(name)
        errors += [relative_error(block(*call.args, **call.kwargs), call.output) for call in calls]
    return torch.stack(errors).mean()


def together(outputs: dict[str, list[Call]], lessons: dict[str, list[Call]]) -> Tensor:
    """Mean relative error power of blocks' outputs in a run of the whole model."""
    pairs = [(a, b) for name in lessons for a, b in zip(outputs[name], lessons[name], strict=True)]
    return torch.stack([relative_error(a.output, b.output) for a, b in pairs]).mean()


def relative_error(output: Any, target: Any) -> Tensor:
    """sum (y - t)^2 / sum t^2 over all tensors of an output."""
    ys, ts = ([t for t in tree_leaves(o) if isinstance(t, Tensor)] for o in (output, target))
    noise = sum(((y.float() - t.float()).square().sum() for y, t in zip(ys, ts, strict=True)), torch.zeros(()))
    power = sum((t.float().square().sum() for t in ts), torch.zeros(()))
    return noise / power.clamp(min=1e-30)
