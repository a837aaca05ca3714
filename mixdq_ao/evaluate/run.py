"""Generates and measures pictures, batch by batch; results are stored at once, so finished work is never repeated.

A directory holds ``run.json`` (the settings), ``pictures/`` and ``rows/`` (metrics' rows of each picture, one file per
metric and shard). A killed run loses its current batch. Shards write to separate files: they can share a directory, or
their directories can be copied into one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MixDQError
from ..models.pipelines import generate
from ..progress import progress
from .metric import Batch, Figure, Metric, Rows
from .pictures import Pictures, to_bytes
from .prompts import Prompts
from .rows import RowFile, read_rows
from .settings import Settings, check_reference, claim, settings_of
from .shard import WHOLE, Shard, numbers_of, suffix_of

Todo = tuple[bool, tuple[str, ...]]
"""What is missing for a picture: the picture itself, and the metrics that have not measured it."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The run whose pictures are the reference of metrics that need one."""

    directory: Path

    def digest(self, settings: Settings) -> str:
        """Digest of the reference pictures for a run of ``settings``; the reference may hold more pictures."""
        return replace(settings_of(self.directory), prompts=settings.prompts, count=settings.count).digest

    def load(self, numbers: Sequence[int]) -> Tensor:
        """uint8 [B, 3, H, W]. Raises MixDQError if a picture is missing."""
        pictures = Pictures(self.directory / "pictures")
        missing = next((n for n in numbers if not pictures.has(n)), None)
        if missing is not None:
            raise MixDQError(f"{self.directory}: has no picture {missing}; finish that run first")
        return torch.stack([pictures.load(n) for n in numbers])


class Run:
    """Generates the pictures of a pipeline for prompts, and measures them with metrics.

    Args:
        directory: of the run; created if it does not exist.
        settings: everything that the pictures depend on.
        prompts: the first ``settings.count`` are generated; the others only identify a larger reference.
        metrics: metrics with different names.
        load: returns the pipeline; called before the first picture is generated.
        reference: directory of the full-precision run, for metrics that need "reference".

    Raises:
        MixDQError: the directory belongs to another run, or a metric needs a reference and none is given.
    """

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        prompts: Prompts,
        metrics: Sequence[Metric],
        load: Callable[[], Any],
        reference: Path | None = None,
    ) -> None:
        if len(prompts.texts) < settings.count:
            raise MixDQError(
                f"{len(prompts.texts)} prompts are given and count is {settings.count}, expected as many at least"
            )
        self.directory, self.settings, self.prompts = directory, settings, prompts
        self.metrics = {metric.name: metric for metric in metrics}
        if len(self.metrics) < len(metrics):
            raise MixDQError(f"metrics are {[m.name for m in metrics]}, expected each once")
        self.reference = None if reference is None else Reference(reference)
        for metric in metrics:
            if "reference" in metric.needs and reference is None:
                raise MixDQError(f"{metric.name} compares with full precision; give the run of that as the reference")
        if reference is not None:
            check_reference(reference, settings_of(reference), settings, prompts)
        claim(directory, settings)
        self.pictures = Pictures(directory / "pictures")
        self._load, self._pipe = load, None

    def work(self, shard: Shard = WHOLE, batch_size: int = 16) -> int:
        """Does the remaining work of a shard; returns how many pictures were generated or measured."""
        with ExitStack() as stack:
            own = {n: stack.enter_context(self._file(n, shard)) for n in self.metrics}
            batches = list(self._missing(shard, batch_size))
            total = sum(len(numbers) for numbers, _ in batches)
            with progress("pictures", total) as bar:
                for numbers, (absent, names) in batches:
                    images = self._draw(numbers) if absent else self._stored(numbers)
                    batch = self._batch(numbers, images, names)
                    for name in names:
                        own[name].append(numbers, self.metrics[name].judge(batch))
                    bar.advance(len(numbers))
        return total

    def figures(self) -> dict[str, Figure] | None:
        """The figure of every metric over all pictures; None while pictures or rows of any shard are missing."""
        wanted = range(self.settings.count)
        found = {}
        for name, metric in self.metrics.items():
            rows = self._rows(name)
            if any(number not in rows for number in wanted):
                return None
            found[name] = self._figure(metric, np.stack([rows[number] for number in wanted]))
        return found if all(self.pictures.has(n) for n in wanted) else None

    def _figure(self, metric: Metric, rows: Rows) -> Figure:
        figure = metric.figure(rows)
        if "reference" in metric.needs and self.reference is not None:
            return replace(figure, against={**figure.against, "reference": self.reference.digest(self.settings)})
        return figure

    def done(self) -> int:
        """Number of pictures, over all shards, that are generated and measured by every metric."""
        rows = [self._rows(name) for name in self.metrics]
        return sum(self.pictures.has(n) and all(n in r for r in rows) for n in range(self.settings.count))

    def _missing(self, shard: Shard, batch_size: int) -> Iterator[tuple[list[int], Todo]]:
        """Batches of adjacent pictures with the same work left."""
        rows = {name: self._rows(name) for name in self.metrics}

        def lacks(number: int) -> Todo:
            return not self.pictures.has(number), tuple(n for n, r in rows.items() if number not in r)

        todo = [(number, lacks(number)) for number in numbers_of(shard, self.settings.count)]
        todo = [(number, lack) for number, lack in todo if lack[0] or lack[1]]
        for (_, lack), group in groupby(enumerate(todo), key=lambda item: (item[1][0] - item[0], item[1][1])):
            numbers = [number for _, (number, _) in group]
            for start in range(0, len(numbers), batch_size):
                yield numbers[start : start + batch_size], lack

    def _draw(self, numbers: list[int]) -> Tensor:
        if self._pipe is None:
            self._pipe = self._load()
        texts = [self.prompts.texts[n] for n in numbers]
        sampling = self.settings.sampling(numbers[0], len(numbers))
        images = to_bytes(torch.cat(list(generate(self._pipe, texts, sampling))))
        for number, image in zip(numbers, images, strict=True):
            self.pictures.save(number, image)
        return images

    def _stored(self, numbers: list[int]) -> Tensor:
        return torch.stack([self.pictures.load(n) for n in numbers])

    def _batch(self, numbers: list[int], images: Tensor, names: tuple[str, ...]) -> Batch:
        compared = any("reference" in self.metrics[n].needs for n in names)
        reference = self.reference.load(numbers) if compared and self.reference is not None else None
        return Batch(images=images, prompts=[self.prompts.texts[n] for n in numbers], reference=reference)

    def _file(self, name: str, shard: Shard) -> RowFile:
        return RowFile(self.directory / "rows" / f"{name}.{suffix_of(shard)}.bin", self._subject(name))

    def _rows(self, name: str) -> Mapping[int, np.ndarray]:
        return read_rows(sorted((self.directory / "rows").glob(f"{name}.*-of-*.bin")), self._subject(name))

    def _subject(self, name: str) -> dict[str, Any]:
        metric = self.metrics[name]
        subject: dict[str, Any] = {"run": self.settings.digest, "metric": name, **metric.identity}
        if "reference" in metric.needs and self.reference is not None:
            subject["reference"] = self.reference.digest(self.settings)
        return subject
