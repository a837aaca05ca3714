"""Which layers read the very same tensor: they share one activation range, so one quantize serves them all."""

from __future__ import annotations

import weakref
from collections import defaultdict

from torch import Tensor


class Ties:
    """Union-find over layer names, joined when two layers are called with the same tensor object."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}
        self.readers: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Layer ``name`` is called with ``x``. A weak reference tells a living tensor from a reused address."""
        self.parent.setdefault(name, name)
        known = self.readers.get(id(x))
        if known is not None and known[0]() is x:
            self.parent[self._root(name)] = self._root(known[1])
        else:
            if len(self.readers) > 1024:
                self.readers = {k: v for k, v in self.readers.items() if v[0]() is not None}
            self.readers[id(x)] = (weakref.ref(x), name)

    def _root(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def groups(self) -> list[tuple[str, ...]]:
        """Groups of two and more layers, in the order they were first seen."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.parent:
            groups[self._root(name)].append(name)
        return [tuple(g) for g in groups.values() if len(g) > 1]
