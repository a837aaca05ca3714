"""One sampling run as a chain of denoiser calls, keeping the autograd graphs between the calls and to the pictures."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import tree_flatten, tree_unflatten
from ..errors import SensitivityError
from ..models.outputs import denoised, with_denoised
from ..models.pipelines import Sampling, drawn, generate, of_prompts_alone
from .probe_tape import frozen
from .watch import denoiser_of, eager, hooked


@dataclass(slots=True)
class Step:
    """One call of the denoiser.

    Attributes:
        flat, spec: detached copies of its arguments, as flattened by ``tree_flatten``.
        links: {index in ``flat``: the argument, attached to the graph of earlier steps' outputs}.
        output: its output [rows, ...], a leaf of the graph that everything later depends on.
    """

    flat: list[Any]
    spec: Any
    links: dict[int, Tensor]
    output: Tensor


@dataclass(slots=True)
class Trace:
    """The steps of a run over ``count`` prompts and its pictures [count, 3, H, W] (None where not requested)."""

    steps: list[Step]
    images: Tensor | None
    count: int

    def picture_gradients(self, cotangent: Tensor) -> list[Tensor]:
        """Gradients of <cotangent, images> at every step's output, with later denoiser calls held constant."""
        assert self.images is not None
        return _gradients([self.images], [s.output for s in self.steps], [cotangent])

    def earlier_gradients(self, step: int, at_links: list[Tensor | None]) -> list[Tensor]:
        """Gradients at a step's links propagated to the outputs of the steps before it."""
        links = [(a, g) for a, g in zip(self.steps[step].links.values(), at_links, strict=True) if g is not None]
        return _gradients([a for a, _ in links], [s.output for s in self.steps[:step]], [g for _, g in links])


def _gradients(outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    if not outputs or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


class _Differentiable:
    """A pipeline whose call keeps gradients: the function under diffusers' ``torch.no_grad`` decorator."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.images = pipe, None
        self.__signature__ = inspect.signature(pipe)

    def __call__(self, **kwargs: Any) -> Any:
        with torch.enable_grad():
            result = inspect.unwrap(type(self.pipe).__call__)(self.pipe, **kwargs)
        self.images = drawn(result)
        return result


def trace(pipe: Any, prompts: list[str], sampling: Sampling, *, pictures: bool) -> Trace:
    """Samples ``prompts`` in one batch. The scheduler, and the decoder where ``pictures``, run with gradients, the
    denoiser without.

    Raises:
        SensitivityError: the pictures do not depend on the denoiser's output in a differentiable way.
    """
    steps: list[Step] = []
    run = _Differentiable(pipe)
    with of_prompts_alone(pipe), _unmarked(pipe), eager(), _recorded(denoiser_of(pipe), steps):
        for _ in generate(run, prompts, sampling, "pt" if pictures else "latent"):
            pass
    images = run.images if pictures else None
    if not steps or (images is not None and not images.requires_grad):
        raise SensitivityError(
            f"{type(pipe).__name__}: its {'pictures do' if steps else 'call does'} not depend on the denoiser in a way "
            "that gradients pass; judge every layer by the denoiser's output, rule=lambda name: 'quality'"
        )
    return Trace(steps, images, len(prompts))


@contextmanager
def _recorded(model: nn.Module, steps: list[Step]) -> Iterator[None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        flat, spec = tree_flatten((args, kwargs))
        links = {i: x for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad}
        flat = [x.detach().clone() if isinstance(x, Tensor) else x for x in flat]
        steps.append(Step(flat, spec, links, torch.empty(0)))
        return tree_unflatten(flat, spec)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        steps[-1].output = leaf = denoised(output).detach().requires_grad_(True)
        return with_denoised(output, leaf)

    with hooked(model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)):
        yield


@contextmanager
def _unmarked(pipe: Any) -> Iterator[None]:
    """Disables the pipeline's watermark inside the block: it breaks the autograd graph, and is invisible."""
    watermark = getattr(pipe, "watermark", None)
    try:
        if watermark is not None:
            pipe.watermark = None
        yield
    finally:
        if watermark is not None:
            pipe.watermark = watermark


@contextmanager
def frozen_pipeline(pipe: Any) -> Iterator[None]:
    """No parameter of any model of the pipeline requires gradients inside the block."""
    parts = getattr(pipe, "components", None)
    parts = parts if isinstance(parts, dict) else vars(pipe)
    with frozen(denoiser_of(pipe), *(m for m in parts.values() if isinstance(m, nn.Module))):
        yield
