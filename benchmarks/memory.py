"""Measures the peak memory of a block of code, as the kernel counts it."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from types import TracebackType

INTERVAL = 0.004


def anonymous() -> int:
    """Resident bytes of this process without file pages, which the kernel can drop."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, "a Linux kernel tells RssAnon"
    return 1024 * int(found[1])


def resident() -> int:
    """Resident bytes of this process, including pages of mapped files."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, "a Linux kernel tells VmRSS"
    return 1024 * int(found[1])


class Peak:
    """``with Peak() as peak: ...``; then ``peak.bytes`` is the peak of ``anonymous`` inside the block, sampled every 4
    ms, above ``base`` (default: its value at the start), and ``peak.seconds`` the time of the block.
    ``peak.with_files`` is the peak of ``resident`` above its value at the start."""

    def __init__(self, base: int | None = None) -> None:
        self.base, self.bytes, self.seconds = anonymous() if base is None else base, 0, 0.0
        self.all_base, self.with_files = resident(), 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, anonymous() - self.base)
        self.with_files = max(self.with_files, resident() - self.all_base)

    def __enter__(self) -> Peak:
        self._start = time.perf_counter()
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._watcher.join()
        self._look()
