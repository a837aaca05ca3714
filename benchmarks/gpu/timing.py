"""Medians of interleaved runs."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch


def _once(fn: Callable[[], object]) -> float:
    """Milliseconds of one run."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        fn()
        return (time.perf_counter() - start) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def captured(fn: Callable[[], object]) -> Callable[[], object]:
    """``fn``, warmed up, as a CUDA graph: a kernel of some microseconds is timed without what the host does before it,
    and stays the one that is compiled now whatever is compiled later. On a CPU ``fn`` itself."""
    if not torch.cuda.is_available():
        fn()
        return fn
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return Replay(graph, fn)


class Replay:
    """A captured graph and what it was captured from: a graph does not keep alive the tensors it reads."""

    def __init__(self, graph: Any, fn: Callable[[], object]) -> None:
        self.graph, self.fn = graph, fn

    def __call__(self) -> None:
        self.graph.replay()


@functools.cache
def _flush() -> torch.Tensor | None:
    """More than a GPU's second-level cache; always the same memory, none that an operand has just left."""
    return torch.empty(128 << 20, dtype=torch.int8, device="cuda") if torch.cuda.is_available() else None


def on_host(fn: Callable[[], object], rounds: int) -> float:
    """Median milliseconds until a run returns, its kernels queued on an idle GPU."""
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[rounds // 2]


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each function; they take turns, so that all meet the same clock and temperature."""
    for fn in functions.values():
        for _ in range(3):
            fn()
    flush = _flush()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, fn in functions.items():
            if flush is not None:
                flush.zero_()  # weights come from memory, as they do in a model
            times[name].append(_once(fn))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}
