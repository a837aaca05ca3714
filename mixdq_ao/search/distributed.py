"""Runs the evaluations of a sensitivity analysis in this process, or on Ray actors that each hold the pipeline.

Ray needs the extra ``mixdq-ao[ray]``. Only the process that called ``analyze`` writes the store, each result as it
arrives. A worker that dies is replaced and its item is run again, so a killed machine costs the items it was working on
and no stored result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch

from ..errors import SensitivityError

Item = TypeVar("Item")
Result = TypeVar("Result", covariant=True)
Build = Callable[[Any], Callable[[Item], Result]]
"""Makes the function from an item to its result, given the pipeline; called once per process that works on items."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayWorkers:
    """The Ray workers that ``analyze`` runs its evaluations on.

    Attributes:
        count: number of workers, each a process with the pipeline in its memory.
        load: loads the pipeline on a worker, for instance from a shared disk; None: the pipeline itself is sent to
            every worker.
        cpus, gpus: resources each worker requests from the cluster.
        losses: workers that may die before the analysis gives up.
        address: address of the cluster for ``ray.init``; None: the one this process is connected to, else a local one.
    """

    count: int
    load: Callable[[], Any] | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    losses: int = 8
    address: str | None = None

    def __post_init__(self) -> None:
        for name, low in (("count", 1), ("cpus", 0), ("gpus", 0), ("losses", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
                raise SensitivityError(f"{name} of RayWorkers is {value!r}, expected at least {low}")


class Pool(Protocol[Item, Result]):
    """Computes the results of items; a context manager that holds the workers."""

    def __enter__(self) -> Pool[Item, Result]: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """Yields (item, result) for all items, in order of completion."""
        ...


def pool_of(workers: RayWorkers | None, pipe: Any, build: Build[Item, Result]) -> Pool[Item, Result]:
    """A pool on Ray where ``workers`` are given, else one in this process."""
    return InProcess(pipe, build) if workers is None else OnRay(workers, pipe, build)


class _Lazy:
    """Calls ``build`` at the first item, and the function it returned for every item."""

    def __init__(self, build: Build, pipe: Callable[[], Any]) -> None:
        self.build, self.pipe, self.work = build, pipe, None

    def __call__(self, item: Any) -> Any:
        if self.work is None:
            self.work = self.build(self.pipe())
        return self.work(item)


class InProcess(Generic[Item, Result]):
    """The pool of this process, which works on one item after the other."""

    def __init__(self, pipe: Any, build: Build[Item, Result]) -> None:
        self.call = _Lazy(build, lambda: pipe)

    def __enter__(self) -> InProcess[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def run(self, items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        for item in items:
            yield item, self.call(item)


class _Worker:
    """The Ray actor of one worker."""

    def __init__(self, pipe: Any, load: Callable[[], Any] | None, build: Build, threads: int) -> None:
        torch.set_num_threads(threads)  # float sums depend on it, and all workers must give equal results
        self.call = _Lazy(build, load or (lambda: pipe))

    def do(self, item: Any) -> Any:
        return self.call(item)


class OnRay(Generic[Item, Result]):
    """The pool of a Ray cluster: actors are started when there is work and killed at the end of the block.

    ``run`` raises SensitivityError where more workers died than ``losses``, and any exception of ``build`` and its
    function on a worker.
    """

    def __init__(self, workers: RayWorkers, pipe: Any, build: Build[Item, Result]) -> None:
        self.ray, self.workers, self.build = _ray(), workers, build
        if not self.ray.is_initialized():
            self.ray.init(address=workers.address, include_dashboard=False, log_to_driver=False)
        self.kind = self.ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(_Worker)
        self.pipe = self.ray.put(None if workers.load is not None else pipe)
        self.idle: list[Any] = []
        self.busy: dict[Any, tuple[Any, Item]] = {}
        self.lost = 0

    def __enter__(self) -> OnRay[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in [*self.idle, *(w for w, _ in self.busy.values())]:
            self.ray.kill(worker)
        self.idle, self.busy = [], {}

    def run(self, items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        waiting = deque(items)
        while waiting or self.busy:
            while waiting and (worker := self._free()) is not None:
                item = waiting.popleft()
                self.busy[worker.do.remote(item)] = worker, item
            done, _ = self.ray.wait(list(self.busy), num_returns=1)
            worker, item = self.busy.pop(done[0])
            try:
                result = self.ray.get(done[0])
            except self.ray.exceptions.RayActorError as e:
                self._lose(e)
                waiting.appendleft(item)
                continue
            except self.ray.exceptions.RayTaskError as e:
                self.idle.append(worker)
                raise (e.cause if isinstance(e.cause, Exception) else e) from None
            self.idle.append(worker)
            yield item, result

    def _free(self) -> Any:
        """An idle worker, a new one where ``count`` allows, else None."""
        if self.idle:
            return self.idle.pop()
        if len(self.busy) < self.workers.count:
            return self.kind.remote(self.pipe, self.workers.load, self.build, torch.get_num_threads())
        return None

    def _lose(self, error: Exception) -> None:
        self.lost += 1
        if self.lost > self.workers.losses:
            raise SensitivityError(
                f"{self.lost} workers died, more than losses={self.workers.losses}; results so far are stored: look at "
                "the memory of the machines and run the same command again"
            ) from error


def _ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]  (an extra)
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise SensitivityError("workers=RayWorkers(...) needs Ray: pip install mixdq-ao[ray]") from e
    return ray
