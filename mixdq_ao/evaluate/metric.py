"""The interface of metrics: numbers per picture, and the figure computed from them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import MixDQError
from .bootstrap import Interval, interval
from .settings import digest

Rows = NDArray[np.floating]
Need = Literal["prompts", "reference"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Pictures to measure.

    Attributes:
        images: [B, 3, H, W], uint8.
        prompts: the prompt of each picture; for metrics that need "prompts".
        reference: a picture of the same shape to compare each one with; for metrics that need "reference".
    """

    images: Tensor
    prompts: Sequence[str] | None = None
    reference: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """The value of a metric for a set of pictures.

    Attributes:
        value: the value.
        interval: 95 % confidence, by bootstrap over the pictures; None if there are too few.
        count: number of pictures.
        linear: [count], float64: the influence of each picture on the value, to first order; None without an interval.
            The interval of the difference of two figures over the same prompts follows from the difference of these.
        against: {kind: digest} of what the pictures are compared with; kinds are "real pictures", "reference" (a run)
            and "reference pictures". Empty if that is nothing, or not known.
    """

    value: float
    interval: Interval | None
    count: int
    linear: NDArray[np.float64] | None
    against: Mapping[str, str] = field(default_factory=dict)


class Metric(ABC):
    """Computes a row of numbers for every picture (a score, or features), and a figure from all rows.

    The row of a picture depends on that picture alone, so that runs can be stopped, continued, sharded and merged.

    Attributes:
        name: column of the table; also used in file names.
        unit: shown beside the name.
        better: whether higher or lower values are better.
        needs: fields of a Batch required besides the images.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"]]
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self) -> None:
        self._kept: list[Rows] = []
        self._compared: list[str] = []

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that rows depend on besides the pictures, as JSON values."""
        return {}

    @property
    def against(self) -> Mapping[str, str]:
        """``against`` of figures, without the reference of a Batch."""
        return {}

    @abstractmethod
    def measure(self, batch: Batch) -> Rows:
        """The row of each picture: [B, width], float32 or float64, finite."""

    @abstractmethod
    def value(self, rows: Rows) -> float:
        """The figure's value for the pictures with these rows [n, width]."""

    @abstractmethod
    def linear(self, rows: Rows) -> NDArray[np.float64] | None:
        """[n]: the influence of each picture on ``value``, with mean zero; None if n is too small."""

    def judge(self, batch: Batch) -> Rows:
        """The checked result of ``measure``.

        Raises MixDQError if the batch lacks a field that the metric needs, or the result is not finite.
        """
        self._check(batch)
        rows = self.measure(batch)
        if rows.ndim != 2 or len(rows) != len(batch.images):
            raise MixDQError(f"{self.name} gave {rows.shape} for {len(batch.images)} pictures, expected a row for each")
        if not np.isfinite(rows).all():
            bad = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
            raise MixDQError(
                f"{self.name} of picture {bad} of the batch is not finite; its network or the picture is broken"
            )
        return rows

    def update(self, batch: Batch) -> Rows:
        """Measures pictures and stores their rows for ``compute``; returns the rows. Raises like ``judge``."""
        rows = self.judge(batch)
        self._kept.append(rows)
        if "reference" in self.needs and batch.reference is not None:
            pictures = (image.cpu().numpy().tobytes() for image in batch.reference)
            self._compared += [hashlib.blake2b(picture, digest_size=16).hexdigest() for picture in pictures]
        return rows

    def compute(self) -> Figure:
        """The figure of all pictures so far. Raises MixDQError if there are none."""
        if not self._kept:
            raise MixDQError(f"{self.name} has seen no picture; call update first")
        figure = self.figure(np.concatenate(self._kept))
        if not self._compared:
            return figure
        return replace(figure, against={**figure.against, "reference pictures": digest(self._compared)})

    def figure(self, rows: Rows) -> Figure:
        """The figure of rows [n, width], with its interval."""
        value, linear = self.value(rows), self.linear(rows)
        return Figure(value, None if linear is None else interval(value, linear), len(rows), linear, self.against)

    def _check(self, batch: Batch) -> None:
        for need in sorted(self.needs):
            given = getattr(batch, need)
            if given is None or len(given) != len(batch.images):
                count = "none" if given is None else len(given)
                raise MixDQError(f"{self.name} needs {need}, one for each of {len(batch.images)} pictures; got {count}")


class MeanMetric(Metric):
    """A metric whose figure is the mean of one score per picture."""

    def value(self, rows: Rows) -> float:
        return float(rows.astype(np.float64).mean())

    def linear(self, rows: Rows) -> NDArray[np.float64] | None:
        scores = rows[:, 0].astype(np.float64)
        return scores - scores.mean() if len(rows) > 1 else None


def column(scores: Tensor) -> Rows:
    """Scores [B] as rows [B, 1], float64."""
    return scores.detach().double().cpu().numpy()[:, None]
