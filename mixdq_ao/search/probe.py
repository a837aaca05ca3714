"""Sensitivity of all layers at all bit widths from a few backward passes with random signs (method="probe")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
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
AT_ONCE = 4
"""Probes of a batch between two writes to the store; with several steps each step's graph serves so many."""


def probe_sensitivity(analysis: Analysis, *, probes: int | None = None, precision: float = 0.995) -> Sensitivity:
    """What ``analyze`` gives, estimated to first order by random probes (see BatchProbe and Estimates).

    ``weight_errors`` and ``act_errors`` are relative error powers of the denoiser's output, each step's own call on
    the full-precision trajectory, summed over steps; a quality layer's score is their SQNR in dB. A content layer's
    score is the PSNR of the decoded pictures in dB (at most 120): all its steps changed together, through scheduler,
    later steps and decoder. SSIM is no squared norm of a linear map, so a probe cannot give it; metadata
    ``content_score`` says "psnr".

    Few probes are made better by what layers and bit widths have in common (``probe_shrink``): 2 of them then rank as
    well as 4 to 6 would by themselves.

    First order has a limit no number of probes lifts: where a large error (4 and 2 bits) tips a saturated attention
    over, the estimate is off in either direction. On the bundled pipeline, 16 prompts, every third layer, rank
    correlations with one layer at a time are .98 and .99 at 2 and 4-bit weights, .999 at 8, .996 and .999 at 4 and
    8-bit activations; one layer at a time repeats itself on other prompts with .96 to .98.

    Probes run in rounds of 2, 2, 4, 8, ... until the estimated rank correlation with infinitely many (see
    Estimates.settled) reaches ``precision`` for weights and activations at every bit width, or 32 have run. Metadata
    holds ``probes``, ``settled``, ``standard_errors`` (of the errors), ``picture_errors`` and
    ``picture_standard_errors`` (mean squared error of the pictures, values in [0, 1]); with several roundings also
    ``rounding_errors``, the errors of all of them, whereas all other figures are of the best.

    Args:
        analysis: its ``budget`` is bytes of layers' output changes kept between probes; what does not fit is computed
            again.
        probes: exactly so many probes; None: as many as ``precision`` asks for.

    Raises:
        SensitivityError: a layer is out of the gradient's reach, the store cannot be used, an argument is wrong.
    """
    _check(analysis.part, probes, precision)
    deltas = deltas_of(analysis.model, *analysis.choices)
    names = analysis.content
    settings, content = analysis.settings(method="probe 2", bits=analysis.bits, content=names), frozenset(names)
    parts = list(batches(analysis.prompts, analysis.sampling))
    here = lambda pipe: _prober(pipe, parts, deltas, content, analysis.budget)  # noqa: E731
    away = _remote(analysis, parts, content)
    with analysis.results(settings) as results, analysis.pool(here, away, settings, results) as pool:
        estimates = _Runs(pool, len(parts), results, analysis.part).settle(probes, precision)
    metadata = analysis.metadata("probe", precision=precision)
    return to_sensitivity(estimates, deltas, analysis.calibration, analysis.rule, metadata)


def _check(part: Part, probes: int | None, precision: float) -> None:
    if (probes is not None and probes < 1) or not 0 < precision < 1:
        raise SensitivityError(f"probes is {probes}, precision {precision}; expected at least 1, and between 0 and 1")
    if part != WHOLE and probes is None:
        raise SensitivityError(f"part {part.index}/{part.of} of how many probes? give probes")


Item = tuple[int, tuple[int, ...]]
"""Number of a batch, numbers of probes."""


def _prober(
    pipe: Any,
    parts: list[tuple[list[str], Sampling]],
    deltas: Mapping[str, LayerDeltas],
    content: Set[str],
    budget: int,
) -> Callable[[Item], list[Record]]:
    """What makes the records of some probes of a batch. Only the trace of the last batch asked for is kept, so a single
    batch is traced once."""
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
    """The same on a worker, which rounds its own weights."""
    choices, budget = analysis.choices, analysis.budget

    def build(pipe: Any) -> Callable[[Item], list[Record]]:
        return _prober(pipe, parts, deltas_of(denoiser_of(pipe), *choices), content, budget)

    return build


class _Runs:
    """Probes of every batch, taken from the store where they are there already."""

    def __init__(self, pool: Pool[Item, list[Record]], batches: int, results: Store, part: Part) -> None:
        self.pool, self.batches, self.results, self.part = pool, batches, results, part

    def settle(self, probes: int | None, precision: float) -> Estimates:
        with progress("probing", (probes or MAX_PROBES) * self.batches) as bar:
            if probes is not None:
                return self._first(probes, bar)
            count = 2
            while True:
                estimates = self._first(count, bar)
                if count >= MAX_PROBES or min(estimates.settled.values()) >= precision:
                    return estimates
                count *= 2

    def _first(self, count: int, bar: Bar) -> Estimates:
        """The estimates of the first ``count`` probes."""
        items: list[Item] = []
        own = set(self.part.of_items([(k, batch) for batch in range(self.batches) for k in range(count)]))
        for batch in range(self.batches):
            todo = [k for k in range(count) if (k, batch) in own and self.results.get(_key(k, batch)) is None]
            items += [(batch, tuple(todo[start : start + AT_ONCE])) for start in range(0, len(todo), AT_ONCE)]
        for (batch, part), records in self.pool.run(items):
            for k, record in zip(part, records, strict=True):
                self.results.put(_key(k, batch), record)
                bar.advance(note=f"batch {batch + 1}")
        keys = [_key(k, batch) for batch in range(self.batches) for k in range(count)]
        self.part.check_whole(sum(key in self.results.results for key in keys), len(keys))
        get: Any = self.results.get
        return Estimates.of([[get(_key(k, b)) for b in range(self.batches)] for k in range(count)])


def _key(probe: int, batch: int) -> str:
    return f"probe {probe}|batch {batch}"
