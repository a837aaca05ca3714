"""What records of probes say together: mean error powers, their standard errors, and whether the ranking is settled."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .probe_batch import Record

Array = NDArray[np.float64]
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Estimates:
    """Records of all probes and batches, summed over batches.

    Attributes:
        keys: (layer, kind, label of an Evaluation, "output" or "picture"), in order of the layers' first calls.
        second, fourth: [probes, keys] sums of p^2 and p^4 over samples, steps and batches.
        power, pixels: sum of squares of the outputs, number of picture values.
    """

    keys: list[Key]
    second: Array
    fourth: Array
    power: float
    pixels: float

    @classmethod
    def of(cls, records: Sequence[Sequence[Record]]) -> Estimates:
        """From [probe][batch] records; a layer a batch never called counts as without error there."""
        names = list(dict.fromkeys(k for r in records[0] for k in r if k.endswith(("|output", "|picture"))))

        def total(suffix: str) -> Array:
            return np.array([[sum(r.get(n + suffix, 0.0) for r in batch) for n in names] for batch in records])

        split = [n.rsplit("|", 3) for n in names]
        keys = [(name, kind, label, target) for name, kind, label, target in split]
        power, pixels = (sum(r[n] for r in records[0]) for n in ("power", "pixels"))
        return cls(keys, total(""), total("|4th"), power, pixels)

    @cached_property
    def scale(self) -> Array:
        """[keys] what sums are divided by: relative error power of outputs, mean squared error of pictures."""
        return np.array([self.power if target == "output" else self.pixels for *_, target in self.keys])

    @cached_property
    def values(self) -> Array:
        """[keys] the estimates: mean over probes."""
        return self.second.mean(0) / self.scale

    @cached_property
    def standard_errors(self) -> Array:
        """[keys] standard errors of ``values`` over the draw of the signs, for these prompts.

        For u = J dY, p is a sum of |u| many random signs: E p^2 = |u|^2 and E p^4 = 3 |u|^4 - 2 sum u_j^4, so the
        variance of p^2, 2 |u|^4 - 2 sum u_j^4, is at most 2/3 of E p^4. That bound needs a single probe only.
        """
        return np.sqrt(self.fourth.sum(0) * 2 / 3) / len(self.second) / self.scale

    @cached_property
    def settled(self) -> dict[tuple[str, str, str], float]:
        """{(kind, label, target): estimated rank correlation, over layers, of ``values`` with infinitely many probes}.

        From the Spearman correlation r of two halves (even and odd probes): the whole correlates with another whole
        of its size by 2 r / (1 + r) (Spearman 1910, Brown 1910), and with the limit by the root of that. 0 with
        fewer than two probes.
        """
        columns: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for i, (_, kind, label, target) in enumerate(self.keys):
            columns[kind, label, target].append(i)
        return {key: self._reliability(of) for key, of in columns.items()}

    def _reliability(self, columns: list[int]) -> float:
        if len(self.second) < 2:
            return 0.0
        r = rank_correlation(self.second[::2, columns].mean(0), self.second[1::2, columns].mean(0))
        return math.sqrt(2 * r / (1 + r)) if r > 0 else 0.0


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's rank correlation of two arrays [n]; equal values are ranked in their order; 1 for n < 2."""
    if len(a) < 2:
        return 1.0
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable") for x in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
