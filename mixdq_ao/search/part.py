"""One of several parts of an analysis, for machines that share nothing but their results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ..errors import SensitivityError

Item = TypeVar("Item")


class Unfinished(SensitivityError):
    """A part is done, and the others are not here."""

    def __init__(self, have: int, need: int) -> None:
        super().__init__(f"{have} of {need} results are here; merge the stores of the other parts")
        self.have, self.need = have, need


@dataclass(frozen=True, slots=True)
class Part:
    """Part ``index`` of ``of``, counted from 1. ``only``: nothing follows from it, even where all is there already."""

    index: int = 1
    of: int = 1
    only: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.of:
            of = max(self.of, 1)
            raise SensitivityError(f"part is {self.index}/{self.of}, expected one from 1/{of} to {of}/{of}")

    @classmethod
    def parse(cls, text: str) -> Part:
        """ "2/8", the second of eight. Raises SensitivityError where that is no part."""
        match = re.fullmatch(r"(\d{1,6})/([1-9]\d{0,5})", text)
        if match is None:
            raise SensitivityError(f"part is {text!r}, expected one such as 2/8, the second of eight")
        return cls(int(match[1]), int(match[2]))

    def alone(self) -> Part:
        return replace(self, only=True)

    def of_items(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every so many-th: what comes early in a model takes longer, so all parts take the same time."""
        return items[self.index - 1 :: self.of]

    def check_whole(self, have: int, need: int) -> None:
        """Raises Unfinished where nothing can follow yet, or should."""
        if self.only or have < need:
            raise Unfinished(have, need)


WHOLE = Part()
