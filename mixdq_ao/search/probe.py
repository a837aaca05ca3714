"""Sensitivity of all layers at all bit widths from a few backward passes with random signs (method="probe")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import SensitivityError
from ..models.pipelines import Sampling
from ..progress import Bar, progress
from .analysis import Analysis
from .batches import batches
from .distributed import Pool
from .part import WHOLE, Part
from .probe_batch import BatchProbe, Record
from .probe_delta import LayerDeltas, deltas_of
from .probe_result import to_sensitivity
from .probe_stats import Estimates
from .sensitivity import Sensitivity
from .store import Store
from .watch import denoiser_of

MAX_PROBES = 32
"""Probes after which ``precision`` is given up."""
AT_ONCE = 4
"""Probes of a batch between two writes to the store; with several steps the graph of each step is built once for so
many."""


@dataclass(frozen=True, slots=True)
class Probing:
    """Estimates sensitivities to first order by random probes (see BatchProbe and Estimates).

    ``weight_errors`` and ``act_errors`` are relative error powers of the denoiser's output, each step's own call on
    the full-precision trajectory, summed over steps; a quality layer's score is their SQNR in dB. A content layer's
    score is the PSNR of the decoded pictures in dB (at most 120): all its steps changed together, through scheduler,
    later steps and decoder. SSIM is no squared norm of a linear map, so a probe cannot give it; metadata
    ``content_score`` says "psnr".

    Shrinking noisy estimates towards the trend over layers and bit widths (``probe_shrink``) makes 2 probes rank layers
    as well as 4 to 6 unshrunk ones.

    A first-order estimate has a limit that more probes do not lift: where a large error (4 and 2 bits) changes what a
    saturated attention attends to, the estimate is too high or too low. On the bundled pipeline, 16 prompts, every
    third layer, rank correlations with method "one_at_a_time" are .98 and .99 at 2 and 4-bit weights, .999 at 8, .996
    and .999 at 4 and 8-bit activations; "one_at_a_time" correlates with itself on other prompts by .96 to .98.

    Probes run in rounds of 2, 2, 4, 8, ... until the estimated rank correlation with infinitely many (see
    Estimates.settled) reaches ``precision`` for weights and activations at every bit width, or 32 have run. Metadata
    holds ``probes``, ``settled``, ``standard_errors`` (of the errors), ``picture_errors`` and
    ``picture_standard_errors`` (mean squared error of the pictures, values in [0, 1]); with several roundings also
    ``rounding_errors``, the errors of every rounding, whereas all other figures are those of the best.

    Attributes:
        analysis: its ``budget`` is the bytes of layers' output changes kept between probes; changes that do not fit are
            computed again.
        probes: exactly this number of probes; None: as many as ``precision`` asks for.
        precision: see above, between 0 and 1.

    Both methods raise SensitivityError: the gradient does not reach a layer, the store cannot be used, or an argument
    is wrong.
    """

    analysis: Analysis
    probes: int | None = None
    precision: float = 0.995

    def fill(self) -> tuple[int, int]:
        """Stores the results of the analysis' part. Returns how many results of all parts are stored, and how many a
        Sensitivity needs."""
        self._check(self.probes is None)
        assert self.probes is not None
        with self._runs(self._deltas()) as runs, runs.bar(self.probes) as bar:
            return runs.fill(self.probes, bar)

    def sensitivity(self) -> Sensitivity:
        """Raises Unfinished, a SensitivityError, where results of other parts are missing."""
        analysis = self.analysis
        self._check(self.probes is None and analysis.part != WHOLE)
        deltas = self._deltas()
        with self._runs(deltas) as runs:
            estimates = runs.settle(self.probes, self.precision)
        metadata = analysis.metadata("probe", precision=self.precision)
        return to_sensitivity(estimates, deltas, analysis.calibration, analysis.rule, metadata)

    def _check(self, uncounted: bool) -> None:
        """``uncounted``: the number of probes is not given and needed, as machines cannot agree on it otherwise."""
        probes, part = self.probes, self.analysis.part
        if (probes is not None and probes < 1) or not 0 < self.precision < 1:
            raise SensitivityError(
                f"probes is {probes}, precision {self.precision}; expected at least 1, and between 0 and 1"
            )
        if uncounted:
            raise SensitivityError(f"part {part.index}/{part.of} of how many probes? give probes")

    def _deltas(self) -> dict[str, LayerDeltas]:
        return deltas_of(self.analysis.model, *self.analysis.choices)

    @contextmanager
    def _runs(self, deltas: Mapping[str, LayerDeltas]) -> Iterator[_Runs]:
        analysis, names = self.analysis, self.analysis.content
        settings, content = analysis.settings(method="probe 2", bits=analysis.bits, content=names), frozenset(names)
        parts = list(batches(analysis.prompts, analysis.sampling))

        def here(pipe: Any) -> Callable[[Item], list[Record]]:
            return _prober(pipe, parts, deltas, content, analysis.budget)

        away = _remote(analysis, parts, content)
        with analysis.results(settings) as results, analysis.pool(here, away, settings, results) as pool:
            yield _Runs(pool, len(parts), results, analysis.part)


Item = tuple[int, tuple[int, ...]]
"""The number of a batch, and the numbers of its probes to run."""


def _prober(
    pipe: Any,
    parts: list[tuple[list[str], Sampling]],
    deltas: Mapping[str, LayerDeltas],
    content: Set[str],
    budget: int,
) -> Callable[[Item], list[Record]]:
    """The function that runs some probes of a batch and returns their records. It keeps the trace of the last batch
    only, so a single batch is traced once."""
    last: list[tuple[int, BatchProbe]] = []

    def probe(part: Item) -> list[Record]:
        batch, probes = part
        if not last or last[0][0] != batch:
            last.clear()
            last.append((batch, BatchProbe(pipe, *parts[batch], batch, deltas, content, budget)))
        return last[0][1].run(probes)

    return probe


def _remote(
    analysis: Analysis, parts: list[tuple[list[str], Sampling]], content: Set[str]
) -> Callable[[Any], Callable[[Item], list[Record]]]:
    """Builds that function on a worker, which rounds the weights of its own pipeline."""
    choices, budget = analysis.choices, analysis.budget

    def build(pipe: Any) -> Callable[[Item], list[Record]]:
        return _prober(pipe, parts, deltas_of(denoiser_of(pipe), *choices), content, budget)

    return build


class _Runs:
    """Runs the probes of every batch that the store does not have yet."""

    def __init__(self, pool: Pool[Item, list[Record]], batches: int, results: Store, part: Part) -> None:
        self.pool, self.batches, self.results, self.part = pool, batches, results, part

    def bar(self, probes: int) -> AbstractContextManager[Bar]:
        return progress("probing", probes * self.batches)

    def settle(self, probes: int | None, precision: float) -> Estimates:
        """The estimates of ``probes`` probes, or of as many as ``precision`` asks for."""
        with self.bar(probes or MAX_PROBES) as bar:
            if probes is not None:
                return self._first(probes, bar)
            count = 2
            while True:
                estimates = self._first(count, bar)
                if count >= MAX_PROBES or min(estimates.settled.values()) >= precision:
                    return estimates
                count *= 2

    def fill(self, count: int, bar: Bar) -> tuple[int, int]:
        """Runs this part's share of the first ``count`` probes of every batch. Returns how many of all parts' results
        are stored, and how many there are in all."""
        items: list[Item] = []
        own = set(self.part.of_items([(k, batch) for batch in range(self.batches) for k in range(count)]))
        for batch in range(self.batches):
            todo = [k for k in range(count) if (k, batch) in own and self.results.get(_key(k, batch)) is None]
            items += [(batch, tuple(todo[start : start + AT_ONCE])) for start in range(0, len(todo), AT_ONCE)]
        for (batch, part), records in self.pool.run(items):
            for k, record in zip(part, records, strict=True):
                self.results.put(_key(k, batch), record)
                bar.advance(note=f"batch {batch + 1}")
        stored = [_key(k, batch) in self.results.results for batch in range(self.batches) for k in range(count)]
        return sum(stored), len(stored)

    def _first(self, count: int, bar: Bar) -> Estimates:
        """The estimates of the first ``count`` probes. Raises Unfinished where some are missing."""
        self.part.check_whole(*self.fill(count, bar))
        results = self.results.results
        return Estimates.of([[results[_key(k, b)] for b in range(self.batches)] for k in range(count)])


def _key(probe: int, batch: int) -> str:
    return f"probe {probe}|batch {batch}"
