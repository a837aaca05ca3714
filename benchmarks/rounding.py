"""Pictures of the bundled pipeline by rounding of its weights, at equal bytes: python -m benchmarks.rounding

PSNR against the full-precision pictures of the same noise, 1 and 4 denoising steps, captions the pipeline never saw.
Uniform plans with each rounding; plans allocated for the least sum of error powers (objective "additive", sensitivities
from random probes) with plain rounding, and with the rounding of each layer chosen by its output error. "Smoothed" and
"rotated": the same with inputs smoothed (strength 0.5) or attention's values rotated, folded into the weights.
Activations 8 bit. "Error" is the relative error power of the denoiser's output at 1 step, as predicted by the sum over
layers and as measured. Writes benchmarks/results/rounding.json and rounding.md. Figures are kept in a store (--store)
as soon as they are measured; a stopped run continues from it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from mixdq_ao import (
    Calibration,
    LayerPlan,
    Moments,
    Plan,
    Sampling,
    Sensitivity,
    allocate,
    analyze,
    calibrate,
    input_moments,
    mixdq_config,
    quantize_,
)
from mixdq_ao.app.environment import environment
from mixdq_ao.app.measure import held_bytes
from mixdq_ao.app.quiet import silence_loading_bars
from mixdq_ao.app.subject import bundled
from mixdq_ao.jsonfile import write_document
from mixdq_ao.layers import find_layers
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.search.fingerprint import fingerprint
from mixdq_ao.search.metrics import error_power, psnr
from mixdq_ao.search.roundings import PLAIN, ROUNDINGS, rounded_as
from mixdq_ao.search.store import Store
from mixdq_ao.search.trial import run

RESULTS = Path(__file__).parent / "results"
BITS = (2.1, 2.25, 2.5, 2.75, 3.0, 4.0, 6.0, 8.0)
OFFERED = (PLAIN, "output nearest", "output compensated")
FOLDED: dict[str, dict[str, Any]] = {"smoothed": {"smoothing": 0.5}, "rotated": {"rotation": True}}
FOLDED_BITS = (2.25, 3.0, 4.0)
CALIBRATION, ANALYSIS, PROBES, TEST, STEPS = 32, 8, 8, 64, (1, 4)


class Subject:
    """The bundled pipeline with everything plans are made from and judged by."""

    def __init__(self) -> None:
        shapes = bundled()
        silence_loading_bars()
        self.pipe = shapes.load_pipeline()
        self.texts = [p.text for p in shapes.prompts(CALIBRATION, seed=55)]
        self.test = [p.text for p in shapes.prompts(TEST, seed=2026, held_out=True)]
        self.samplings = {steps: Sampling(steps=steps, seed=10_000, batch_size=TEST) for steps in STEPS}
        self.references = {steps: generate_all(self.pipe, self.test, s) for steps, s in self.samplings.items()}
        self.output = self.denoised(self.pipe)
        self.calibration: Calibration = calibrate(self.pipe, self.texts, steps=STEPS)
        self.folded = {name: calibrate(self.pipe, self.texts, steps=STEPS, **how) for name, how in FOLDED.items()}
        self.moments: Moments = input_moments(self.pipe, self.texts, calibration=self.calibration, steps=STEPS)
        self.sensitivities: dict[str, Sensitivity] = {}
        self.rounded: dict[tuple[str, LayerPlan], nn.Parameter] = {}

    def calibration_of(self, folded: str | None) -> Calibration:
        return self.calibration if folded is None else self.folded[folded]

    def sensitivity(self, name: str, roundings: tuple[str, ...], store: Path, folded: str | None) -> Sensitivity:
        suffix, start = ".".join(filter(None, (name, folded))), time.process_time()
        if suffix in self.sensitivities:
            return self.sensitivities[suffix]
        options: dict[str, Any] = {"calibration": self.calibration_of(folded), "batch_size": ANALYSIS, "probes": PROBES}
        options |= {"roundings": roundings, "moments": self.moments, "act_bits": (8,)}
        file = store.with_suffix(f".{suffix}.jsonl")
        found = analyze(self.pipe, self.texts[:ANALYSIS], method="probe", store=file, **options)
        print(f"sensitivity, {suffix}: {time.process_time() - start:.0f} s", flush=True)
        return self.sensitivities.setdefault(suffix, found)

    def denoised(self, pipe: Any) -> Tensor:
        return run(pipe, self.test, self.samplings[1], images=False).denoised

    def quantized(self, plan: Plan, folded: str | None) -> tuple[Any, float]:
        """A copy in real mode, and seconds it took; weights that an earlier plan rounded the same way are taken where
        nothing is folded into them."""
        clone, start = copy.copy(self.pipe), time.process_time()
        unet = copy.deepcopy(self.pipe.unet)
        plan = plan.with_calibration(self.calibration_of(folded))
        if folded is not None:
            quantize_(unet, mixdq_config(plan, moments=self.moments))
        else:
            self.reuse(unet, plan)
        object.__setattr__(clone, "unet", unet)
        return clone, time.process_time() - start

    def reuse(self, unet: nn.Module, plan: Plan) -> None:
        new = {n: layer for n, layer in plan.layers.items() if (n, layer) not in self.rounded}
        quantize_(unet, mixdq_config(Plan(new, plan.metadata, plan.bos_embedding), moments=self.moments))
        layers = find_layers(unet)
        for name, layer in plan.layers.items():
            weight: Any = layers[name].weight
            layers[name].weight = self.rounded.setdefault((name, layer), weight)

    def judge(self, plan: Plan, folded: str | None) -> dict[str, float]:
        clone, seconds = self.quantized(plan, folded)
        row = {"weight_bytes": held_bytes(clone.unet), "seconds": seconds}
        row["error"] = error_power(self.output, self.denoised(clone))
        for steps, sampling in self.samplings.items():
            images: Tensor = generate_all(clone, self.test, sampling)
            row[f"psnr at {steps}"] = psnr(images, self.references[steps]).mean().item()
        return row


class Planned(NamedTuple):
    """A plan to judge: what it is called, its bits, the predicted error, and how its inputs are folded."""

    name: str
    bits: float
    plan: Plan
    predicted: float | None = None
    folded: str | None = None
    ways: dict[str, dict[str, int]] | None = None
    """{bits: {rounding: layers}} of the sensitivity."""


def allocated(subject: Subject, store: Path, folded: str | None, widths: Iterable[float]) -> Iterator[Planned]:
    for name, roundings in (("plain", (PLAIN,)), ("chosen", OFFERED)):
        sensitivity = subject.sensitivity(name, roundings, store, folded)
        ways = {str(b): dict(Counter(v.rounding(b) for v in sensitivity.layers.values())) for b in (2, 4, 8)}
        for bits in widths:
            found = allocate(sensitivity, weight_bits=bits, act_bits=8, objective="additive")
            yield Planned(titled("allocated", name, folded), bits, found.plan, found.predicted_error, folded, ways)


def uniform(subject: Subject, folded: str | None, roundings: Sequence[str], widths: Iterable[int]) -> Iterator[Planned]:
    for bits in widths:
        plain = Plan.uniform(subject.pipe.unet, bits, 8)
        for rounding in roundings:
            plan = plain.with_layers({n: rounded_as(layer, rounding) for n, layer in plain.layers.items()})
            yield Planned(titled("uniform", rounding, folded), bits, plan, folded=folded)


def titled(kind: str, rounding: str, folded: str | None) -> str:
    return ", ".join(filter(None, (kind, rounding, folded)))


def plans(subject: Subject, store: Path) -> Iterator[Planned]:
    """Those that are compared with smoothed and rotated ones first, then the rest."""
    for folded in (None, *FOLDED):
        yield from allocated(subject, store, folded, FOLDED_BITS)
        yield from uniform(subject, folded, (PLAIN, "output compensated"), (2, 4))
    yield from allocated(subject, store, None, [b for b in BITS if b not in FOLDED_BITS])
    yield from uniform(subject, None, (PLAIN, "output compensated"), (8,))
    yield from uniform(subject, None, [r for r in ROUNDINGS if r not in (PLAIN, "output compensated")], (2, 4))


def measure(subject: Subject, store: Store, path: Path) -> Iterator[dict[str, Any]]:
    """The results so far, after each plan."""
    result: dict[str, Any] = {"rows": [], "layers_by_rounding": {}}
    for planned in plans(subject, path):
        plan, name, bits = planned.plan, planned.name, planned.bits
        digest = hashlib.blake2b(json.dumps(plan.to_json()["layers"]).encode(), digest_size=6).hexdigest()
        key = f"{name}|{bits:g}|{digest}"
        if store.get(key) is None:
            store.put(key, subject.judge(plan, planned.folded))
        row = {"plan": name, "weight_bits": bits, "predicted_error": planned.predicted, **store.results[key]}
        print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
        result["rows"].append(row)
        if planned.ways is not None:
            result["layers_by_rounding"][name] = planned.ways
        yield result


def table(rows: list[Mapping[str, Any]]) -> str:
    """Markdown: one line a plan and rounding, one column a bit width, for each number of steps."""
    widths = sorted({row["weight_bits"] for row in rows})
    lines = []
    for steps in STEPS:
        cells = {(row["plan"], row["weight_bits"]): f"{row[f'psnr at {steps}']:.1f}" for row in rows}
        lines += [f"| PSNR, dB, {steps} step{'s' * (steps > 1)}; weight bits | " + " | ".join(f"{b:g}" for b in widths)]
        lines[-1] += " |"
        lines.append("|---" * (len(widths) + 1) + "|")
        for name in dict.fromkeys(row["plan"] for row in rows):
            lines.append(f"| {name} | " + " | ".join(cells.get((name, b), "") for b in widths) + " |")
        lines.append("")
    held = {row["weight_bits"]: row["weight_bytes"] for row in rows if row["plan"] == "allocated, chosen"}
    lines.append("Bytes of the allocated plans: " + ", ".join(f"{b:g} bits {n:,.0f}" for b, n in sorted(held.items())))
    return "\n".join(lines) + ".\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for rounding.json and rounding.md")
    parser.add_argument("--store", type=Path, default=Path("out/rounding.jsonl"), help="measurements so far")
    args = parser.parse_args()
    settings = {"calibration": CALIBRATION, "analysis": ANALYSIS, "probes": PROBES, "test": TEST, "steps": list(STEPS)}
    header = {"command": "python -m benchmarks.rounding", "prompts": settings, "offered": list(OFFERED)}
    header["folded"] = FOLDED
    header["environment"] = environment()
    title = (__doc__ or "").split("\n\n")[1].replace("\n", " ").split(" Writes")[0]
    subject = Subject()
    with Store(args.store, fingerprint(subject.pipe, {"prompts": settings})) as store:
        for result in measure(subject, store, args.store):
            write_document(args.out / "rounding.json", {**header, **result})
            (args.out / "rounding.md").write_text(f"`{header['command']}`. {title}\n\n{table(result['rows'])}")


if __name__ == "__main__":
    main()
