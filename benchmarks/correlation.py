"""How well sensitivities predict measured errors on the bundled pipeline: python -m benchmarks.correlation

Single layers: error powers estimated by random probes, and the score of ModelOpt's auto_quantize, against one layer
quantized at a time; rank correlation over layers, and seconds of one core. Whole plans: random ones of 2-, 4- and 8-bit
weights (activations 8 bits) and allocated ones, quantized and run on captions the pipeline never saw; rank correlation
of their measured error with the sum of error powers (objective "additive"), the sum of dB ("sqnr"), the published
objective (SSIM of content layers, dB of quality layers, which it maximises apart), and ModelOpt's score. Writes
benchmarks/results/correlation.json and correlation.md. Every figure is kept in a store (--store); a stopped run
continues.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mixdq_ao import Plan, Sampling, Sensitivity, allocate, analyze, calibrate
from mixdq_ao.app.environment import environment
from mixdq_ao.app.quiet import silence_loading_bars
from mixdq_ao.app.subject import bundled
from mixdq_ao.errors import AllocationError
from mixdq_ao.jsonfile import write_document
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.search.fingerprint import fingerprint
from mixdq_ao.search.metrics import psnr
from mixdq_ao.search.prediction import Agreement, faked, measured_errors, predicted_error, random_plans
from mixdq_ao.search.probe_baseline import Scores, gradient_scores
from mixdq_ao.search.probe_stats import rank_correlation
from mixdq_ao.search.sensitivity import Kind
from mixdq_ao.search.store import Store

RESULTS = Path(__file__).parent / "results"
CALIBRATION, ANALYSIS, TEST, RANDOM, PROBES = 32, 8, 32, 48, (1, 4, 16)
BUDGETS = (2.5, 3.0, 4.0, 5.0, 6.0)
CHOICES: tuple[tuple[Kind, int], ...] = (("weight", 2), ("weight", 4), ("weight", 8), ("act", 4), ("act", 8))
ONE = "one layer at a time"
MODELOPT = "sum of (g dY)^2 (ModelOpt), 4 probes"
Tables = Mapping[Kind, Mapping[str, Mapping[int, float]]]


class Subject:
    """The bundled pipeline, its calibration, and what plans are judged by."""

    def __init__(self, store: Path) -> None:
        shapes = bundled()
        silence_loading_bars()
        self.folder, self.pipe = store, shapes.load_pipeline()
        self.texts = [p.text for p in shapes.prompts(CALIBRATION, seed=55)]
        self.test = [p.text for p in shapes.prompts(TEST, seed=2026, held_out=True)]
        self.sampling = Sampling(steps=1, seed=10_000, batch_size=TEST)
        self.reference = generate_all(self.pipe, self.test, self.sampling)
        self.calibration = calibrate(self.pipe, self.texts, steps=1)

    def analyzed(self, store: Store, name: str, **options: Any) -> tuple[Sensitivity, float]:
        """A sensitivity and the seconds it took, from a file where it is there already."""
        path = self.folder.with_suffix(f".{name.replace(' ', '_')}.json")
        key = f"seconds|{name}"
        if store.get(key) is None or not path.exists():
            start = time.process_time()
            found = analyze(
                self.pipe, self.texts[:ANALYSIS], calibration=self.calibration, batch_size=ANALYSIS, **options
            )
            store.put(key, {"seconds": time.process_time() - start})
            found.save(path)
        print(f"{name}: {store.results[key]['seconds']:.1f} s of one core", flush=True)
        return Sensitivity.load(path), store.results[key]["seconds"]

    def judge(self, plan: Plan) -> dict[str, float]:
        """Error power of the denoiser's output, and of the pictures."""
        plan = plan.with_calibration(self.calibration)
        error = measured_errors(self.pipe, [plan], self.test, sampling=self.sampling)[0]
        with faked(self.pipe.unet, plan):
            decibel = psnr(generate_all(self.pipe, self.test, self.sampling), self.reference)
        return {"error": error, "pictures": 10 ** (-decibel.mean().item() / 10)}


def errors_of(sensitivity: Sensitivity) -> Tables:
    kinds: tuple[Kind, ...] = ("weight", "act")
    return {k: {n: dict(v.errors(k)) for n, v in sensitivity.layers.items()} for k in kinds}


def layers(one: Sensitivity, tables: Tables) -> dict[str, float]:
    """Rank correlation over layers with the measured error powers, at each kind and bit width."""
    return {
        f"{kind[0].upper()}{bits}": rank_correlation(
            np.array([layer.errors(kind)[bits] for layer in one.layers.values()]),
            np.array([tables[kind][name][bits] for name in one.layers]),
        )
        for kind, bits in CHOICES
    }


def plans_of(one: Sensitivity) -> list[tuple[str, Plan]]:
    """Random plans, then the best of each objective at every budget that it can meet."""
    plans = [(f"random {i}", plan) for i, plan in enumerate(random_plans(one, RANDOM))]
    for objective in ("additive", "sqnr", "decoupled"):
        for bits in BUDGETS:
            try:
                found = allocate(one, weight_bits=bits, act_bits=8, objective=objective)
            except AllocationError:
                continue
            plans.append((f"{objective} {bits:g}", found.plan))
    return plans


def summed(plan: Plan, score: Callable[[str, Kind, int], float]) -> float:
    each = ((n, k, b) for n, v in plan.layers.items() for k, b in (("weight", v.weight_bits), ("act", v.act_bits)))
    return sum(score(n, k, b) for n, k, b in each if b < 16)  # type: ignore[arg-type]


def predictions(
    plans: Sequence[Plan], one: Sensitivity, probed: Sensitivity, modelopt: Scores
) -> dict[str, list[float]]:
    """What each objective says of each plan; higher is worse."""

    def published(group: str) -> Callable[[str, Kind, int], float]:
        return lambda n, k, b: -one.layers[n].scores(k)[b] if one.layers[n].group == group else 0.0

    content, quality = ([summed(p, published(g)) for p in plans] for g in ("content", "quality"))
    return {
        f"additive, {ONE}": [predicted_error(one, p) for p in plans],
        f"additive, {PROBES[-1]} probes": [predicted_error(probed, p) for p in plans],
        "sum of dB": [summed(p, lambda n, k, b: -one.layers[n].sqnr(k)[b]) for p in plans],
        "published, content (SSIM)": content,
        "published, quality (dB)": quality,
        "published, both in units of their spread": (_scaled(content) + _scaled(quality)).tolist(),
        MODELOPT: [summed(p, lambda n, k, b: modelopt[k][n][b]) for p in plans],
    }


def _scaled(values: Sequence[float] | np.ndarray) -> np.ndarray:
    return (np.array(values) - np.mean(values)) / np.std(values)


def agreements(found: Mapping[str, Sequence[float]], errors: Sequence[float]) -> dict[str, dict[str, Any]]:
    table = {name: asdict(Agreement.of(values, errors)) for name, values in found.items()}
    both = [np.array(found[f"published, {g}"]) for g in ("content (SSIM)", "quality (dB)")]
    mixed = [Agreement.of(((1 - w) * _scaled(both[0]) + w * _scaled(both[1])).tolist(), errors).rank for w in WEIGHTS]
    table["published, both, the weights that suit these errors best"] = {"plans": len(errors), "rank": max(mixed)}
    return table


WEIGHTS = np.linspace(0, 1, 101)


def measure(subject: Subject, store: Store) -> dict[str, Any]:
    one, seconds = subject.analyzed(store, ONE)
    single: dict[str, Any] = {}
    probed = one
    for count in PROBES:
        probed, took = subject.analyzed(store, f"{count} probes", method="probe", probes=count)
        ratios = [probed.layers[n].weight_errors[8] / v.weight_errors[8] for n, v in one.layers.items()]
        single[f"{count} probes"] = {
            "seconds": took,
            "times_faster": seconds / took,
            "rank": layers(one, errors_of(probed)),
        }
        single[f"{count} probes"]["median_ratio_W8"] = float(np.median(ratios))
    start, options = time.process_time(), {"sampling": Sampling(batch_size=ANALYSIS), "probes": 4}
    modelopt = gradient_scores(subject.pipe, subject.texts[:ANALYSIS], subject.calibration, **options)
    took = time.process_time() - start
    single[MODELOPT] = {"seconds": took, "times_faster": seconds / took, "rank": layers(one, modelopt)}
    named = plans_of(one)
    for name, plan in named:
        if store.get(f"plan|{name}") is None:
            store.put(f"plan|{name}", subject.judge(plan))
            print(name, store.results[f"plan|{name}"], flush=True)
    rows = [{"plan": n, **store.results[f"plan|{n}"]} for n, _ in named]
    found = predictions([p for _, p in named], one, probed, modelopt)
    chance = {name: values[:RANDOM] for name, values in found.items()}
    return {
        "layers": {"number": len(one.layers), "seconds, one at a time": seconds, "estimates": single},
        "plans, error of the output": agreements(found, [r["error"] for r in rows]),
        "plans, error of the pictures": agreements(found, [r["pictures"] for r in rows]),
        "random plans only, error of the output": agreements(chance, [r["error"] for r in rows[:RANDOM]]),
        "rows": rows,
    }


def tables(figures: Mapping[str, Any]) -> str:
    """Markdown."""
    single = figures["layers"]
    heads = [f"{k[0].upper()}{b}" for k, b in CHOICES]
    lines = [
        f"| {single['number']} layers | seconds | times faster | " + " | ".join(f"rank, {h}" for h in heads) + " |"
    ]
    lines += ["|---" * (len(heads) + 3) + "|"]
    lines += [f"| {ONE} | {single['seconds, one at a time']:.1f} | 1 |" + " |" * len(heads)]
    for name, row in single["estimates"].items():
        ranks = " | ".join(f"{row['rank'][h]:.3f}" for h in heads)
        label = "1 probe" if name == "1 probes" else name
        lines.append(f"| {label} | {row['seconds']:.2f} | {row['times_faster']:.0f} | {ranks} |")
    titles = [t for t in figures if "plans, " in t or "plans only" in t]
    lines += ["", "| rank correlation over whole plans | " + " | ".join(titles) + " | measured / predicted, spread |"]
    lines += ["|---" * (len(titles) + 2) + "|"]
    for name, row in figures[titles[0]].items():
        ranks = " | ".join(f"{figures[t][name]['rank']:.3f}" for t in titles)
        unit = "additive" in name and row.get("ratio") is not None
        ratio = f"{row['ratio']:.2f}, {row['spread']:.0%}" if unit else ""
        lines.append(f"| {name} | {ranks} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for correlation.json and correlation.md")
    parser.add_argument("--store", type=Path, default=Path("out/correlation.jsonl"), help="measurements so far")
    args = parser.parse_args()
    settings = {"calibration": CALIBRATION, "analysis": ANALYSIS, "test": TEST, "steps": 1, "random_plans": RANDOM}
    header = {"command": "python -m benchmarks.correlation", "prompts": settings, "environment": environment()}
    subject = Subject(args.store)
    with Store(args.store, fingerprint(subject.pipe, {"prompts": settings})) as store:
        figures = measure(subject, store)
    write_document(args.out / "correlation.json", {**header, **figures})
    title = (__doc__ or "").split("\n\n")[1].replace("\n", " ").split(" Writes")[0]
    (args.out / "correlation.md").write_text(f"`{header['command']}`. {title}\n\n{tables(figures)}")


if __name__ == "__main__":
    main()
