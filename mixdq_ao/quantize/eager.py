"""Eager mode on a CPU, where nothing fuses and nobody else sees that two layers compute the same.

All text projections of a model look for BOS rows in one tensor; the answer is kept while that tensor lives. A graph
being traced holds the operators themselves; :mod:`inductor_kernels.alike` finds those of a compiled one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..compat import is_in_torch_dispatch_mode


def is_eager(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor on a CPU and nobody traces or intercepts what happens to it."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
    )


class _Known:
    """What was computed of an input, by the identity of the parameter it was computed with."""

    __slots__ = ("tensor", "version", "results")

    def __init__(self, x: Tensor, dropped: Callable[[object], None]) -> None:
        self.tensor, self.version = weakref.ref(x, dropped), x._version
        self.results: dict[int, tuple[Tensor, Tensor]] = {}  # (parameter, result)


_known: dict[int, _Known] = {}


def reused(x: Tensor, parameter: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, or its result of an earlier call with the same ``x``, unchanged since, and ``parameter``.

    ``parameter`` is told by identity and must never be changed in place, nor the result. Of ``x`` autograd's version
    counter says whether it was written to, which what writes past it (``x.data``, ``x.numpy()``) does not count.
    """
    # An inference tensor does not tell when it is changed, and one made in inference mode is of no use outside.
    if not is_eager(x) or x.is_inference() or torch.is_inference_mode_enabled():
        return compute()
    place = id(x)
    known = _known.get(place)
    if known is None or known.tensor() is not x or known.version != x._version:

        def drop(gone: object) -> None:
            if place in _known and _known[place].tensor is gone:
                del _known[place]

        known = _known[place] = _Known(x, drop)
    found = known.results.get(id(parameter))
    if found is None:
        found = known.results[id(parameter)] = parameter, compute()
    return found[1]
