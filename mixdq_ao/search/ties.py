"""Finds layers that read the same tensor object: they share one activation range, so it is quantized once for all."""

from __future__ import annotations

import weakref
from collections import defaultdict

from torch import Tensor

MOST = 1024
"""Tensors remembered before dead ones are dropped; it bounds memory, and changes no result."""


class Ties:
    """Union-find over layer names, joined when two layers are called with the same tensor object."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}
        self.readers: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Records that layer ``name`` is called with ``x``. Weak references tell a live tensor from a reused
        address."""
        self.parent.setdefault(name, name)
        known = self.readers.get(id(x))
        if known is not None and known[0]() is x:
            self.parent[self._root(name)] = self._root(known[1])
        else:
            if len(self.readers) > MOST:
                self.readers = {k: v for k, v in self.readers.items() if v[0]() is not None}
            self.readers[id(x)] = (weakref.ref(x), name)

    def _root(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def groups(self) -> list[tuple[str, ...]]:
        """Groups of two or more layers, in the order they were first seen."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.parent:
            groups[self._root(name)].append(name)
        return [tuple(g) for g in groups.values() if len(g) > 1]
