"""Where the evaluations of a sensitivity analysis run: in this process, or on Ray actors that each hold the pipeline.

Ray needs the extra ``mixdq-ao[ray]``. The process that called ``analyze`` is the only one that writes the store; it
takes each result as it comes. A worker that dies is replaced and what it was doing is given out again, so a killed
machine costs the work it had in hand and no result.
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
"""Given the pipeline, makes what turns an item into its result; called once where items are worked on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayWorkers:
    """Where ``analyze`` runs its evaluations.

    Attributes:
        count: workers, each a process with the pipeline in its memory.
        load: makes the pipeline on a worker, for instance from a disk all machines see; None: the pipeline itself is
            sent to every worker.
        cpus, gpus: what each worker asks of the cluster.
        losses: workers that may die before the analysis gives up.
        address: of the cluster, for ``ray.init``; None: the one this process is connected to, else a local one.
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
    """Works on items; a context manager."""

    def __enter__(self) -> Pool[Item, Result]: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """(item, result) for all items, in the order they are done."""
        ...


def pool_of(workers: RayWorkers | None, pipe: Any, build: Build[Item, Result]) -> Pool[Item, Result]:
    """Ray's where there are workers; else one in this process."""
    return InProcess(pipe, build) if workers is None else OnRay(workers, pipe, build)


class _Lazy:
    """``build`` where it is first needed, and the function it made."""

    def __init__(self, build: Build, pipe: Callable[[], Any]) -> None:
        self.build, self.pipe, self.work = build, pipe, None

    def __call__(self, item: Any) -> Any:
        if self.work is None:
            self.work = self.build(self.pipe())
        return self.work(item)


class InProcess(Generic[Item, Result]):
    """One after the other, here."""

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
    """What runs in a worker's process."""

    def __init__(self, pipe: Any, load: Callable[[], Any] | None, build: Build, threads: int) -> None:
        torch.set_num_threads(threads)  # sums depend on it, and all workers must give the same
        self.call = _Lazy(build, load or (lambda: pipe))

    def do(self, item: Any) -> Any:
        return self.call(item)


class OnRay(Generic[Item, Result]):
    """Actors of a Ray cluster, hired when there is work and dismissed at the end of the block.

    ``run`` raises SensitivityError where more workers died than ``losses``, and whatever ``build`` and its function
    raise on a worker.
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
        """A worker with nothing to do, a new one where there may be one more, else None."""
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
