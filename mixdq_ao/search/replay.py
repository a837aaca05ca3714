"""Replay: runs a model again, reusing the recorded outputs of everything that ran before one layer.

While recording, the starts and ends of all module calls are numbered, and their outputs kept as far as the memory
budget allows (those of the most deeply nested modules are dropped first). To measure a change in layer L, every
recorded call that ended before the first call of L returns its kept output; the rest runs.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..compat import tree_flatten
from ..errors import SensitivityError


@dataclass(slots=True)
class Call:
    """One call of one module: its start and end on the Recorder's clock, and its output, if kept."""

    start: int
    end: int = -1
    output: Any = None
    kept: bool = False
    versions: tuple[int, ...] = ()


class Recorder:
    """Records and replays the calls of ``modules`` (name -> module, e.g. those of a UNet and the text encoders).

    ``budget``: bytes of outputs to keep.
    """

    def __init__(self, modules: Mapping[str, nn.Module], budget: int = 4 << 30) -> None:
        self.modules, self.budget = dict(modules), budget
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self.clock = self.bytes = 0
        self._kept: list[tuple[int, int, int, Call]] = []  # a heap, the deepest modules first

    @contextmanager
    def record(self) -> Iterator[None]:
        """Records the runs inside the block; the modules are restored at its end."""
        with _patched(self.modules, self._recording):
            yield

    def _recording(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = Call(self._tick())
            self.calls[name].append(call)
            output = forward(*args, **kwargs)
            call.end = self._tick()
            self._keep(name, call, output)
            return output

        return run

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def _keep(self, name: str, call: Call, output: Any) -> None:
        tensors = _tensors(output)
        size = sum(t.numel() * t.element_size() for t in tensors)
        call.output, call.kept, call.versions = output, True, tuple(t._version for t in tensors)
        heapq.heappush(self._kept, (-name.count("."), call.start, size, call))
        self.bytes += size
        while self.bytes > self.budget:
            _, _, size, deepest = heapq.heappop(self._kept)
            deepest.output, deepest.kept = None, False
            self.bytes -= size

    @contextmanager
    def replay(self, until: str) -> Iterator[None]:
        """Runs inside the block reuse the outputs of calls that ended before the recorded run first called
        ``until``."""
        if not self.calls[until]:
            raise SensitivityError(f"layer {until!r} was never called in the recorded run")
        stop = self.calls[until][0].start
        position = 0

        def replaying(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            calls = self.calls[name]

            def run(*args: Any, **kwargs: Any) -> Any:
                # This call repeats the first recorded call after the last one matched. Counting calls would be wrong:
                # where a module returns its kept output, the modules inside it are not called.
                nonlocal position
                call = next((c for c in calls if c.start > position), None)
                if call is not None and call.kept and call.end < stop and _unchanged(call):
                    position = call.end
                    return call.output
                position = position if call is None else call.start
                return forward(*args, **kwargs)

            return run

        early = {n: m for n, m in self.modules.items() if any(c.kept and c.end < stop for c in self.calls[n])}
        with _patched(early, replaying):
            yield


def _tensors(output: Any) -> list[Tensor]:
    leaves, _ = tree_flatten(output)
    return [t for t in leaves if isinstance(t, Tensor)]


def _unchanged(call: Call) -> bool:
    """Whether the model has not changed the kept output in place since; otherwise the module has to run again."""
    return tuple(t._version for t in _tensors(call.output)) == call.versions


@contextmanager
def _patched(modules: Mapping[str, nn.Module], wrap: Callable[..., Callable[..., Any]]) -> Iterator[None]:
    """Wraps every module's ``forward`` inside the block (as an instance attribute, removed or restored at its end)."""
    previous = {n: m.__dict__["forward"] for n, m in modules.items() if "forward" in m.__dict__}
    try:
        for name, module in modules.items():
            module.forward = wrap(name, module.forward)
        yield
    finally:
        for name, module in modules.items():
            if name in previous:
                module.forward = previous[name]
            else:
                module.__dict__.pop("forward", None)


def replayable(model: nn.Module) -> dict[str, nn.Module]:
    """All submodules of ``model`` that are called, so not ModuleList or ModuleDict."""
    skip = (nn.ModuleList, nn.ModuleDict)
    return {n: m for n, m in model.named_modules() if n and not isinstance(m, skip)}
