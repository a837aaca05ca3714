"""Pictures of the bundled pipeline by rounding of its weights, at equal bytes: python -m benchmarks.rounding

PSNR against the full-precision pictures of the same noise, one denoising step, captions the pipeline never saw. Uniform
plans with each rounding; plans allocated for the least sum of error powers (objective "additive", sensitivities from
random probes) with plain rounding, and with the rounding of each layer chosen by its output error. Activations 8 bit.
Writes benchmarks/results/rounding.json and rounding.md.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mixdq_ao import Calibration, Plan, Sampling, Sensitivity, allocate, analyze, calibrate, mixdq_config, quantize_
from mixdq_ao.app.environment import environment
from mixdq_ao.app.measure import held_bytes
from mixdq_ao.app.quiet import silence_loading_bars
from mixdq_ao.app.subject import bundled
from mixdq_ao.jsonfile import write_document
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.search.metrics import psnr
from mixdq_ao.search.moments import Moments, input_moments
from mixdq_ao.search.roundings import PLAIN, ROUNDINGS, rounded_as

RESULTS = Path(__file__).parent / "results"
BITS = (2.1, 2.25, 2.5, 2.75, 3.0, 4.0)
OFFERED = (PLAIN, "output nearest", "output compensated")
CALIBRATION, ANALYSIS, TEST = 32, 8, 64


class Subject:
    """The bundled pipeline with everything plans are made from and judged by."""

    def __init__(self) -> None:
        shapes = bundled()
        silence_loading_bars()
        self.pipe = shapes.load_pipeline()
        self.texts = [p.text for p in shapes.prompts(CALIBRATION, seed=55)]
        self.test = [p.text for p in shapes.prompts(TEST, seed=2026, held_out=True)]
        self.sampling = Sampling(steps=1, seed=10_000, batch_size=64)
        self.reference = generate_all(self.pipe, self.test, self.sampling)
        self.calibration: Calibration = calibrate(self.pipe, self.texts, steps=(1, 4))
        self.moments: Moments = input_moments(self.pipe, self.texts, calibration=self.calibration, steps=(1, 4))

    def sensitivity(self, roundings: tuple[str, ...], probes: int | None = None) -> Sensitivity:
        options: dict[str, Any] = {"calibration": self.calibration, "batch_size": ANALYSIS, "probes": probes}
        ways: dict[str, Any] = {"roundings": roundings, "moments": self.moments}
        return analyze(self.pipe, self.texts[:ANALYSIS], method="probe", **options, **ways)

    def judge(self, name: str, plan: Plan, bits: float) -> dict[str, Any]:
        """Quantizes a copy in real mode and compares its pictures."""
        clone, start = copy.copy(self.pipe), time.process_time()
        unet = copy.deepcopy(self.pipe.unet)
        quantize_(unet, mixdq_config(plan.with_calibration(self.calibration), moments=self.moments))
        seconds = time.process_time() - start
        object.__setattr__(clone, "unet", unet)
        images: Tensor = generate_all(clone, self.test, self.sampling)
        decibel = psnr(images, self.reference).mean().item()
        row = {"plan": name, "weight_bits": bits, "psnr": decibel, "weight_bytes": held_bytes(unet), "seconds": seconds}
        print(
            f"{name:32} {bits:5} bits  {decibel:6.2f} dB  {row['weight_bytes']:9} bytes  {seconds:5.1f} s", flush=True
        )
        return row


def uniform(subject: Subject, bits: int, rounding: str) -> Plan:
    plan = Plan.uniform(subject.pipe.unet, bits, 8)
    return plan.with_layers({n: rounded_as(layer, rounding) for n, layer in plan.layers.items()})


def measure(subject: Subject) -> dict[str, Any]:
    rows = [subject.judge(f"uniform, {r}", uniform(subject, bits, r), bits) for bits in (2, 4) for r in ROUNDINGS]
    rows.append(subject.judge(f"uniform, {PLAIN}", uniform(subject, 8, PLAIN), 8))
    chosen: dict[str, dict[int, Counter[str]]] = {}
    for name, roundings in (("plain", (PLAIN,)), ("chosen", OFFERED)):
        start = time.process_time()
        sensitivity = subject.sensitivity(roundings)
        print(f"sensitivity, {name}: {time.process_time() - start:.0f} s", flush=True)
        chosen[name] = {b: Counter(v.rounding(b) for v in sensitivity.layers.values()) for b in (2, 4, 8)}
        for bits in BITS:
            plan = allocate(sensitivity, weight_bits=bits, act_bits=8, objective="additive").plan
            rows.append(subject.judge(f"allocated, {name}", plan, bits))
    return {"rows": rows, "layers_by_rounding": {n: {str(b): dict(c) for b, c in v.items()} for n, v in chosen.items()}}


def table(rows: list[Mapping[str, Any]]) -> str:
    """Markdown: one line a plan and rounding, one column a bit width."""
    widths = sorted({row["weight_bits"] for row in rows})
    cells = {(row["plan"], row["weight_bits"]): f"{row['psnr']:.1f}" for row in rows}
    lines = [
        "| PSNR, dB; average weight bits | " + " | ".join(f"{b:g}" for b in widths) + " |",
        "|---" * (len(widths) + 1) + "|",
    ]
    for name in dict.fromkeys(row["plan"] for row in rows):
        lines.append(f"| {name} | " + " | ".join(cells.get((name, b), "") for b in widths) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for rounding.json and rounding.md")
    out: Path = parser.parse_args().out
    figures = measure(Subject())
    settings = {"calibration": CALIBRATION, "analysis": ANALYSIS, "test": TEST, "steps": 1, "offered": list(OFFERED)}
    write_document(out / "rounding.json", {**figures, "prompts": settings, "environment": environment()})
    title = (__doc__ or "").split("\n\n")[1].replace("\n", " ").split(" Writes")[0]
    (out / "rounding.md").write_text(f"`python -m benchmarks.rounding`. {title}\n\n{table(figures['rows'])}")


if __name__ == "__main__":
    main()
