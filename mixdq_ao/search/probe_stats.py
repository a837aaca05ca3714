"""Statistics of probes' records: mean error powers, their standard errors, and the reliability of the ranking."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrays import Array
from .probe_batch import Record
from .probe_shrink import shrunk

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Estimates:
    """Estimates from the records of all probes, summed over batches.

    Attributes:
        keys: (layer, kind, label of an Evaluation, "output" or "picture"), in order of the layers' first calls.
        second, fourth: [probes, keys] sums of p^2 and p^4 over samples, steps and batches.
        change, rows: [keys] sum of squares of the layer's own change, and number of p^2 per probe.
        power, pixels: sum of squares of the outputs, number of picture values.
    """

    keys: list[Key]
    second: Array
    fourth: Array
    change: Array
    rows: Array
    power: float
    pixels: float

    @classmethod
    def of(cls, records: Sequence[Sequence[Record]]) -> Estimates:
        """Estimates from records [probe][batch]; a layer that a batch never called has no error in that batch."""
        names = list(dict.fromkeys(k for r in records[0] for k in r if k.endswith(("|output", "|picture"))))

        def total(suffix: str, probes: Sequence[Sequence[Record]] = records) -> Array:
            return np.array([[sum(r.get(n + suffix, 0.0) for r in batch) for n in names] for batch in probes])

        split = [n.rsplit("|", 3) for n in names]
        keys = [(name, kind, label, target) for name, kind, label, target in split]
        power, pixels = (sum(r[n] for r in records[0]) for n in ("power", "pixels"))
        change, rows = (total(suffix, records[:1])[0] for suffix in ("|change", "|rows"))
        return cls(keys, total(""), total("|4th"), change, rows, power, pixels)

    @cached_property
    def scale(self) -> Array:
        """[keys] divisor of the sums, giving relative error power of outputs and mean squared error of pictures."""
        return np.array([self.power if target == "output" else self.pixels for *_, target in self.keys])

    @cached_property
    def values(self) -> Array:
        """[keys] the estimates: means over probes, shrunk towards the trend over layers and bit widths (``shrunk``)
        where there are enough layers."""
        return self._posterior[0] / self.scale

    @cached_property
    def standard_errors(self) -> Array:
        """[keys] standard errors of ``values`` over the draw of the signs, for these prompts.

        They are those of the posterior, or of the mean where an estimate was not shrunk. For the latter: with u = J dY,
        p = sum of u_j times random signs, so E p^2 = |u|^2 and E p^4 = 3 |u|^4 - 2 sum u_j^4, and the variance of p^2,
        2 |u|^4 - 2 sum u_j^4, is at most 2/3 of E p^4. That bound can be estimated from a single probe.
        """
        means, deviations = self._posterior
        plain = np.sqrt(self.fourth.sum(0) * 2 / 3) / len(self.second)
        return np.where(np.isnan(deviations), plain, deviations * means) / self.scale

    @cached_property
    def _posterior(self) -> tuple[Array, Array]:
        return self._shrunk(self.second)

    def _shrunk(self, second: Array) -> tuple[Array, Array]:
        """Shrunk sums of p^2 per probe [keys] from some of the probes, and their relative deviations; layers with the
        same choices are shrunk together."""
        means, deviations = second.mean(0), np.full(len(self.keys), np.nan)
        for table in self._tables:
            mean = means[table] / np.maximum(self.rows[table], 1)
            found = shrunk(mean, self.change[table] / np.maximum(self.rows[table], 1), len(second) * self.rows[table])
            means[table], deviations[table] = found[0] * np.maximum(self.rows[table], 1), found[1]
        return means, deviations

    @cached_property
    def _tables(self) -> list[NDArray[np.intp]]:
        """Indices into ``keys`` [layers, columns], one table for each target and set of layers with equal choices."""
        own: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i, (name, _, _, target) in enumerate(self.keys):
            own[name, target].append(i)
        alike: dict[tuple[object, ...], list[list[int]]] = defaultdict(list)
        for (_, target), indices in own.items():
            alike[target, *(self.keys[i][1:3] for i in indices)].append(indices)
        return [np.array(rows) for rows in alike.values()]

    @cached_property
    def settled(self) -> dict[tuple[str, str, str], float]:
        """{(kind, label, target): estimated rank correlation over layers between ``values`` and their limit for
        infinitely many probes}.

        From the Spearman correlation r of two halves (even and odd probes): all probes correlate with as many other
        probes by 2 r / (1 + r) (Spearman 1910, Brown 1910), and with the limit by the root of that. 0 with fewer than
        two probes.
        """
        columns: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for i, (_, kind, label, target) in enumerate(self.keys):
            columns[kind, label, target].append(i)
        if len(self.second) < 2:
            return dict.fromkeys(columns, 0.0)
        halves = [self._shrunk(self.second[start::2])[0] for start in (0, 1)]
        return {key: _reliability(halves[0][of], halves[1][of]) for key, of in columns.items()}


def _reliability(a: Array, b: Array) -> float:
    r = rank_correlation(a, b)
    return math.sqrt(2 * r / (1 + r)) if r > 0 else 0.0


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of two arrays [n]; equal values share their mean rank. Where an array is constant, 1
    if the other one is too and 0 if not; 1 for n < 2."""
    if np.size(a) < 2:
        return 1.0
    ranks = _ranks(a), _ranks(b)
    constant = [r.min() == r.max() for r in ranks]
    return float(all(constant)) if any(constant) else float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: ArrayLike) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]
