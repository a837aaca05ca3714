"""Observing a model while it runs: the model of a pipeline, hooks on its layers, and eager execution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..compat import uncompiled
from ..errors import MixDQError
from ..models.pipelines import denoiser

See = Callable[[str, Any, Tensor, Tensor], Tensor | None]
"""Called with the name and module of a layer, its input and output; a result other than None replaces the output."""


def model_of(pipe: Any) -> nn.Module:
    """``pipe`` itself where it is a module, else its denoiser."""
    return uncompiled(pipe) if isinstance(pipe, nn.Module) else denoiser_of(pipe)


def denoiser_of(pipe: Any) -> nn.Module:
    """``denoiser(pipe)`` without a ``torch.compile`` wrapper: plans name the layers of the wrapped model."""
    return uncompiled(denoiser(pipe))


class _Eagerness:
    """``torch.compiler``'s stance, which is global to all threads: "force_eager" while any holder is left."""

    def __init__(self) -> None:
        self._lock, self._holders, self._stance = Lock(), 0, ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if self._holders == 0:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._stance.close()


_EAGERNESS = _Eagerness()


@contextmanager
def eager() -> Iterator[None]:
    """Inside the block no thread runs compiled code: it may skip hooks, and every changed layer would recompile it."""
    with _EAGERNESS.held():
        yield


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """The hooks of ``handles`` are removed at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(model: nn.Module, names: Iterable[str], see: See) -> Iterator[None]:
    """Calls ``see`` after each call of the named layers inside the block, which runs eagerly.

    Raises MixDQError where a layer is called with its input neither first nor as ``input=``.
    """
    layers = [(name, model.get_submodule(name)) for name in names]
    handles = [m.register_forward_hook(partial(_hook, name, see), with_kwargs=True) for name, m in layers]
    with hooked(*handles), eager():
        yield


def _hook(
    name: str, see: See, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    if not args and "input" not in kwargs:
        raise MixDQError(
            f"layer {name!r}: is called with {', '.join(kwargs)}, expected its input first, or as input=; call it so"
        )
    return see(name, module, args[0] if args else kwargs["input"], output)
