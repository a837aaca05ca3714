"""Reuse of equal results in eager mode on a CPU, where no compiler finds that two layers compute the same.

All text projections of a model look for BOS rows in one tensor; the mask is cached while that tensor lives. A traced
graph contains every operator; in a compiled one :mod:`inductor_kernels.alike` finds equal ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..compat import is_in_torch_dispatch_mode


def is_eager(x: Tensor) -> bool:
    """Whether ``x`` is a plain CPU tensor and its operators are neither traced nor intercepted by a dispatch mode."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
    )


class _Known:
    """Results computed from one input, by the id of the parameter they were computed with."""

    __slots__ = ("tensor", "version", "results")

    def __init__(self, x: Tensor, dropped: Callable[[object], None]) -> None:
        self.tensor, self.version = weakref.ref(x, dropped), x._version
        self.results: dict[int, tuple[Tensor, Tensor]] = {}  # (parameter, result)


_known: dict[int, _Known] = {}


def reused(x: Tensor, parameter: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, or its result of an earlier call with the same ``x`` and ``parameter``.

    Tensors are compared by identity. Neither ``parameter`` nor the result may be changed in place. Autograd's version
    counter tells whether ``x`` was written to; it misses writes that bypass it (``x.data``, ``x.numpy()``).
    """
    # Inference tensors have no version counter, and a result made in inference mode cannot be used outside of it.
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
