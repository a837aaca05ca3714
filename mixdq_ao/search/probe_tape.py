"""One call of a model with gradients, whose backward passes contract each layer's gradient with its deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import tree_unflatten
from ..errors import SensitivityError
from ..models.outputs import denoised
from .probe_delta import LayerDeltas
from .watch import watched

Contract = Callable[[Tensor, Tensor], Tensor]


def inner(deltas: Tensor, gradient: Tensor) -> Tensor:
    """<g, dY>: deltas [groups, choices, n], gradient [groups, n] -> [groups, choices]."""
    return torch.bmm(deltas, gradient.unsqueeze(-1)).squeeze(-1)


def add(a: Tensor | None, b: Tensor) -> Tensor:
    """Sum of two results [groups, choices]; where their group counts differ, summed over groups first: [1, choices]."""
    if a is None or a.shape == b.shape:
        return b if a is None else a + b
    return a.sum(0, keepdim=True) + b.sum(0, keepdim=True)


@dataclass(slots=True)
class _Seen:
    """One call of one layer: its input, or its deltas where they fit the memory budget."""

    name: str
    groups: int
    x: Tensor | None
    deltas: Tensor | None = None
    counted: bool = False


@dataclass(slots=True)
class _Sink:
    """Receives the gradients from the graph's hooks. It holds no part of the graph, which is thus freed with its Tape.

    ``changes``: {layer: sum of squares of its deltas [choices], over samples}, for layers of the pulls so far.
    """

    deltas: Mapping[str, LayerDeltas]
    room: int
    rows: int = 1
    seen: list[_Seen] = field(default_factory=list)
    results: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, Tensor] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    names: Set[str] = frozenset()
    contract: Contract = inner

    def nothing(self, name: str, device: torch.device) -> Tensor:
        """The result of a layer that the output does not depend on: zeros [groups, choices]."""
        groups = next(call.groups for call in self.seen if call.name == name)
        choices = len(self.deltas[name].choices)
        self.changes.setdefault(name, torch.zeros(choices, dtype=torch.float64, device=device))
        return torch.zeros(groups, choices, device=device)

    def see(self, name: str, x: Tensor, y: Tensor) -> int:
        groups = self.rows if y.shape[0] % self.rows == 0 else 1
        call = _Seen(name, groups, x.detach())
        needed = 4 * y.numel() * len(self.deltas[name].choices)
        if needed <= self.room:
            self.room -= needed
            call.deltas, call.x = self.deltas[name].stack(x, groups), None
        self.seen.append(call)
        return len(self.seen) - 1

    @torch.no_grad()
    def take(self, index: int, gradient: Tensor) -> None:
        call = self.seen[index]
        self.reached.add(call.name)
        if call.name not in self.names:
            return
        deltas = call.deltas
        if deltas is None:
            assert call.x is not None
            deltas = self.deltas[call.name].stack(call.x, call.groups)
        if not call.counted:
            call.counted = True
            power = torch.linalg.vector_norm(deltas, dim=2).double().square().sum(0)
            self.changes[call.name] = self.changes.get(call.name, 0) + power
        result = self.contract(deltas, gradient.reshape(call.groups, -1).float())
        self.results[call.name] = add(self.results.get(call.name), result)


class Tape:
    """The graph of one call ``model(*args, **kwargs)``, and every layer's deltas for it.

    It keeps, besides autograd's own tensors, deltas up to ``budget`` bytes, and the inputs of the layers whose deltas
    did not fit (these are computed again at each pull). A layer's gradient is used and freed as soon as it is computed.

    Args:
        model: its prediction (``denoised``) is differentiated; parameters must not require gradients.
        flat, spec: the arguments (args, kwargs) as flattened by ``tree_flatten``.
        wanted: indices of the floating-point tensors in ``flat`` whose gradients pull() returns.
        rows: samples in the first dimension of layers' outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        deltas: Mapping[str, LayerDeltas],
        flat: Sequence[Any],
        spec: Any,
        wanted: Sequence[int] = (),
        *,
        rows: int,
        budget: int,
    ) -> None:
        flat = list(flat)
        for i in wanted:
            flat[i] = flat[i].detach().clone().requires_grad_(True)
        self.links = [flat[i] for i in wanted]
        self.leaves: list[Tensor] = []
        self.sink = _Sink(deltas, budget, rows)
        args, kwargs = tree_unflatten(flat, spec)
        self.unused: Set[str] = frozenset()
        self.call = lambda: denoised(model(*args, **kwargs))
        self.model = model
        with watched(model, deltas, self._see), torch.enable_grad():
            self.output = self.call()

    def _see(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Hooks the gradient of a layer's output, which becomes a leaf of the graph where it requires none yet."""
        if not torch.is_grad_enabled():
            raise SensitivityError(
                f"layer {name!r}: the model calls it without gradients (torch.no_grad in its forward); analyze with "
                "method='one_at_a_time'"
            )
        index = self.sink.see(name, x, y)
        if not y.requires_grad:
            self.leaves.append(y.detach().requires_grad_(True))
            y = self.leaves[-1].clone()  # a leaf may not be changed in place, which some models do
        y.register_hook(partial(self.sink.take, index))
        return y

    def pull(
        self, cotangent: Tensor, names: Set[str], contract: Contract = inner
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """One backward pass with ``cotangent``, shaped like the output.

        Returns:
            {name: contract(dY, g) [groups, choices]} for the layers in ``names`` that were called, and the gradients
            of the wanted arguments.

        Raises:
            SensitivityError: the gradient does not reach some layers, which it names, and the output depends on them.
        """
        sink = self.sink
        sink.results, sink.names, sink.contract = {}, names, contract
        sink.reached.clear()
        gradients: Sequence[Tensor | None] = ()
        if self.output.requires_grad:
            inputs = [*self.links, *self.leaves]
            gradients = torch.autograd.grad(self.output, inputs, cotangent, retain_graph=True, allow_unused=True)
        missed = sorted({call.name for call in sink.seen} - sink.reached - self.unused)
        if missed and not self._unused(missed):
            raise SensitivityError(
                f"layers {', '.join(missed)}: called, but no gradient of the model's output reaches their own output; "
                "analyze with method='one_at_a_time'"
            )
        self.unused |= set(missed)
        results, sink.results = sink.results, {}
        results |= {name: sink.nothing(name, self.output.device) for name in self.unused & names}
        return results, list(gradients[: len(self.links)])

    @torch.no_grad()
    def _unused(self, names: Sequence[str]) -> bool:
        """Whether the output is bit for bit the same when these layers' outputs are changed.

        A model for picture and text may compute text in its last block that nothing reads (Qwen-Image).
        """

        def other(name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return 2 * y + 1

        expected = self.call()
        with watched(self.model, names, other):
            return torch.equal(self.call(), expected)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No parameter of ``modules`` requires gradients inside the block; ``requires_grad`` is restored afterwards."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
