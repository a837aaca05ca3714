"""A part of a run, for one of several machines."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import MixDQError


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` of ``of``, counted from 1."""

    index: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """ "2/8". Raises MixDQError where that is no part."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise MixDQError(f"shard is {text!r}, expected a part such as 2/8, the second of eight")
        return cls(int(match[1]), int(match[2]))

    def range(self, count: int) -> range:
        """Its share of the numbers 0 to ``count``: adjacent ones, so that batches are full."""
        return range(count * (self.index - 1) // self.of, count * self.index // self.of)

    @property
    def suffix(self) -> str:
        """Part of file names: shards never write to the same file."""
        return f"{self.index}-of-{self.of}"

    @property
    def whole(self) -> bool:
        return self.of == 1
