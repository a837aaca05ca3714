"""Looking at a model while it runs: which model it is, and what its layers are called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import uncompiled
from ..errors import MixDQError
from ..models.pipelines import denoiser

See = Callable[[str, Any, Tensor, Tensor], Tensor | None]
"""Name and module of a layer, its input and its output; what it gives, unless None, is the output from there on."""


def model_of(pipe: Any) -> nn.Module:
    """``pipe`` itself where it is a module, else its denoiser."""
    return uncompiled(pipe) if isinstance(pipe, nn.Module) else denoiser_of(pipe)


def denoiser_of(pipe: Any) -> nn.Module:
    """``denoiser(pipe)``, the model that ``torch.compile`` wrapped where it did: plans name the layers of that one."""
    return uncompiled(denoiser(pipe))


class _Eagerness:
    """torch's stance, which is one for all threads: set by the first that asks for it, restored by the last to end."""

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
    """Nothing inside runs compiled, in no thread: compiled code may pass over hooks, and is made anew for every layer
    changed."""
    with _EAGERNESS.held():
        yield


@contextmanager
def watched(model: nn.Module, names: Iterable[str], see: See) -> Iterator[None]:
    """``see`` is called after each call of the named layers inside the block, which runs eagerly; all hooks are removed
    at its end.

    Raises MixDQError where a layer gets its input neither by place nor as ``input``.
    """
    with ExitStack() as stack:
        stack.enter_context(eager())
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(partial(_hook, name, see), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(
    name: str, see: See, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    if not args and "input" not in kwargs:
        raise MixDQError(
            f"layer {name!r}: is called with {', '.join(kwargs)}, expected its input first, or as input=; call it so"
        )
    return see(name, module, args[0] if args else kwargs["input"], output)
