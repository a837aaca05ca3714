"""What a search costs and what its plans are worth, on the bundled pipeline: python -m benchmarks.search

One layer at a time (175 layers, weights at 2, 4 and 8 bits, inputs at 4 and 8, 8 prompts), every evaluation from the
start as in published code and with everything before the changed layer computed once, beside random probes. Seconds
are of one core; those "from the start" are of every tenth layer's evaluations, times ten. Plans of 3 and 4 bits on
average by the additive objective, minimum and maximum as ranges, nearest rounding, inputs of 8 bits; PSNR of pictures
of 64 captions that nothing saw, against full precision, at one step. "As published": the decoupled objective. Writes
benchmarks/results/search.json and search.md; what is measured is kept in --work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixdq_ao import Sampling, Sensitivity, allocate, analyze, calibrate
from mixdq_ao.app.environment import environment
from mixdq_ao.app.quantized import quantized
from mixdq_ao.app.subject import bundled
from mixdq_ao.errors import AllocationError
from mixdq_ao.jsonfile import write_document
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.search.evaluation import Evaluation
from mixdq_ao.search.metrics import psnr
from mixdq_ao.search.trial import Trials

from . import record
from .peers.kept import Row, Rows

RESULTS = Path(__file__).parent / "results"
PROMPTS, JUDGED, EVERY = 8, 64, 10
BITS = (3.0, 4.0)
PROBES = (1, 4, 16)
KINDS = (("weight", (2, 4, 8)), ("act", (4, 8)))


class Search:
    def __init__(self, work: Path) -> None:
        shapes = bundled()
        self.pipe, self.work = shapes.load_pipeline(), work
        self.texts = [p.text for p in shapes.prompts(PROMPTS, seed=55)]
        self.judged = [p.text for p in shapes.prompts(JUDGED, seed=2026, held_out=True)]
        self.calibration = calibrate(self.pipe, self.texts, batch_size=PROMPTS)
        self.reference = self.pictures(self.pipe)

    def pictures(self, pipe: Any) -> torch.Tensor:
        return generate_all(pipe, self.judged, Sampling(seed=10_000, batch_size=32))

    def analyzed(self, **options: Any) -> Sensitivity:
        return analyze(self.pipe, self.texts, calibration=self.calibration, batch_size=PROMPTS, **options)

    def quality(self, sensitivity: Sensitivity, objective: Any) -> dict[str, float]:
        """PSNR in dB by bits; without those that have no plan (quality layers have 4 bits and more as published)."""
        found = {}
        for bits in BITS:
            try:
                plan = allocate(sensitivity, weight_bits=bits, act_bits=8, objective=objective).plan
            except AllocationError:
                continue
            pictures = self.pictures(quantized(self.pipe, plan.with_calibration(self.calibration)))
            found[f"{bits:g}"] = psnr(pictures, self.reference).mean().item()
        return found

    def timed(self, search: Callable[[], Sensitivity], objective: str = "additive") -> Row:
        start = time.process_time()
        sensitivity = search()
        return {"seconds": time.process_time() - start, "psnr": self.quality(sensitivity, objective)}

    def from_the_start(self) -> Row:
        """Seconds of all evaluations, from every tenth layer's."""
        sampling = Sampling(batch_size=PROMPTS)
        trials = Trials(self.pipe, self.texts, sampling, replay=False)
        names, bos = trials.called(), self.calibration.bos_embedding
        embedding = None if bos is None else torch.tensor(bos)
        some = names[EVERY // 2 :: EVERY]
        start = time.process_time()
        for name in some:
            for kind, widths in KINDS:
                for bits in widths:
                    layer = Evaluation(name, kind, bits).layer(self.calibration)  # type: ignore[arg-type]
                    trials.measure(name, layer, embedding, images=True)
        return {"seconds": (time.process_time() - start) * len(names) / len(some), "psnr": {}}


@torch.no_grad()
def measure(rows: Rows, work: Path) -> dict[str, Row]:
    search = Search(work)
    for probes in PROBES:

        def run(n=probes):
            return search.analyzed(method="probe", probes=n)

        rows(f"probes: {probes}", lambda run=run: _with_grad(lambda: search.timed(run)))
    rows("one layer at a time, from the start", search.from_the_start)
    store = work / "one_at_a_time.jsonl"

    def reused() -> Row:
        before = _lines(store)
        row = search.timed(lambda: search.analyzed(store=store))
        row["seconds"] *= _lines(store) / (_lines(store) - before)  # of all, where a stopped run went on
        return row

    rows("one layer at a time, reused", reused)

    def again():
        return search.timed(lambda: search.analyzed(store=store), "decoupled")

    published = rows("one layer at a time, as published", again)
    if "error" not in published:
        published["seconds"] = rows.rows["one layer at a time, reused"]["seconds"]  # its results were there already
    return rows.rows


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def _with_grad(work: Callable[[], Row]) -> Row:
    with torch.enable_grad():
        return work()


def table(rows: dict[str, Row]) -> str:
    slowest = rows["one layer at a time, from the start"]["seconds"]
    lines = ["| search | seconds | times cheaper | PSNR dB, 3 bits | 4 bits |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = [f"{row['seconds']:.1f}", f"{slowest / row['seconds']:.0f}"]
        cells += [f"{row['psnr'][key]:.1f}" if (key := f"{bits:g}") in row["psnr"] else "" for bits in BITS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--work", type=Path, default=Path("out/search"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = measure(Rows(options.work / "rows.json", lambda name, row: print(name, row, flush=True)), options.work)
    e = environment()
    command = record.command("benchmarks.search")
    write_document(options.out / "search.json", {"command": command, "rows": found, "environment": e})
    where = (
        f"{e['processor']}, {e['cpu_capability']}, torch {e['packages']['torch']}, commit {e['commit']}; `{command}`"
    )
    text = "\n\n".join([(__doc__ or "").strip(), table(found), where])
    (options.out / "search.md").write_text(text + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
