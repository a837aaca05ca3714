"""What a metric is: numbers kept of every picture, and the figure they add up to."""

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
    """Pictures to judge.

    Attributes:
        images: [B, 3, H, W], uint8.
        prompts: the texts they were drawn from, one each; for metrics that need "prompts".
        reference: pictures of the same shape to compare with, one each; for metrics that need "reference".
    """

    images: Tensor
    prompts: Sequence[str] | None = None
    reference: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """What a metric says of a set of pictures.

    Attributes:
        value: the figure.
        interval: 95 % by bootstrap over the pictures; None where there are too few.
        count: pictures.
        linear: [count], float64: what each picture adds to the figure, to first order; None where there is no interval.
            The difference of two figures over the same prompts has the interval of the difference of these.
        against: digests of what the pictures are compared with, by kind: "real pictures", "reference" (the run) or
            "reference pictures"; empty where there is nothing, or it is not known.
    """

    value: float
    interval: Interval | None
    count: int
    linear: NDArray[np.float64] | None
    against: Mapping[str, str] = field(default_factory=dict)


class Metric(ABC):
    """Numbers kept of every picture (a score, or features), and the figure they add up to.

    What is kept of a picture depends on that picture alone, so that runs can be stopped, continued, divided and put
    together.

    Attributes:
        name: column of the table; also the name of files.
        unit: shown beside the name.
        better: whether more is better.
        needs: what must be in a Batch besides the images.
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
        """All that the kept numbers depend on besides the pictures, as JSON values."""
        return {}

    @property
    def against(self) -> Mapping[str, str]:
        """What ``against`` of the figure says besides the reference of a Batch."""
        return {}

    @abstractmethod
    def measure(self, batch: Batch) -> Rows:
        """What is kept of each picture: [B, width], float32 or float64, finite."""

    @abstractmethod
    def value(self, rows: Rows) -> float:
        """The figure of the pictures whose rows [n, width] these are."""

    @abstractmethod
    def linear(self, rows: Rows) -> NDArray[np.float64] | None:
        """[n]: the influence of each picture on ``value``; mean zero. None where n is too small to say."""

    def judge(self, batch: Batch) -> Rows:
        """What ``measure`` says of pictures, checked.

        Raises MixDQError where the batch lacks what the metric needs, or the result is not finite.
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
        """Judges pictures and keeps what it says of them for ``compute``; returns what is kept. Raises as ``judge``."""
        rows = self.judge(batch)
        self._kept.append(rows)
        if "reference" in self.needs and batch.reference is not None:
            pictures = (image.cpu().numpy().tobytes() for image in batch.reference)
            self._compared += [hashlib.blake2b(picture, digest_size=16).hexdigest() for picture in pictures]
        return rows

    def compute(self) -> Figure:
        """The figure of all pictures so far. Raises MixDQError where there are none."""
        if not self._kept:
            raise MixDQError(f"{self.name} has seen no picture; call update first")
        figure = self.figure(np.concatenate(self._kept))
        if not self._compared:
            return figure
        return replace(figure, against={**figure.against, "reference pictures": digest(self._compared)})

    def figure(self, rows: Rows) -> Figure:
        """The figure of kept rows [n, width], with its interval."""
        value, linear = self.value(rows), self.linear(rows)
        return Figure(value, None if linear is None else interval(value, linear), len(rows), linear, self.against)

    def _check(self, batch: Batch) -> None:
        for need in sorted(self.needs):
            given = getattr(batch, need)
            if given is None or len(given) != len(batch.images):
                count = "none" if given is None else len(given)
                raise MixDQError(f"{self.name} needs {need}, one for each of {len(batch.images)} pictures; got {count}")


class MeanMetric(Metric):
    """A metric whose figure is the mean of a score per picture."""

    def value(self, rows: Rows) -> float:
        return float(rows.astype(np.float64).mean())

    def linear(self, rows: Rows) -> NDArray[np.float64] | None:
        scores = rows[:, 0].astype(np.float64)
        return scores - scores.mean() if len(rows) > 1 else None


def column(scores: Tensor) -> Rows:
    """Scores [B] as rows [B, 1], float64."""
    return scores.detach().double().cpu().numpy()[:, None]
