"""A part of an analysis: what one of several machines works on that share nothing but their results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import SensitivityError

Item = TypeVar("Item")


class Unfinished(SensitivityError):
    """This part's results are stored; a Sensitivity also needs those of the other parts."""

    def __init__(self, have: int, need: int) -> None:
        super().__init__(f"{have} of {need} results are here; merge the stores of the other parts")
        self.have, self.need = have, need


@dataclass(frozen=True, slots=True)
class Part:
    """Part ``index`` of ``of``, counted from 1. ``only``: store this part's results, never assemble the final one."""

    index: int = 1
    of: int = 1
    only: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.of:
            of = max(self.of, 1)
            raise SensitivityError(f"part is {self.index}/{self.of}, expected one from 1/{of} to {of}/{of}")

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that a text such as "2/8" names, the second of eight. Raises SensitivityError for any other text."""
        match = re.fullmatch(r"(\d{1,6})/([1-9]\d{0,5})", text)
        if match is None:
            raise SensitivityError(f"part is {text!r}, expected one such as 2/8, the second of eight")
        return cls(int(match[1]), int(match[2]))

    def of_items(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every ``of``-th item: early layers take longer, so interleaving balances the parts."""
        return items[self.index - 1 :: self.of]

    def check_whole(self, have: int, need: int) -> None:
        """Raises Unfinished where results are missing, or the part is ``only`` to be stored."""
        if self.only or have < need:
            raise Unfinished(have, need)


WHOLE = Part()
