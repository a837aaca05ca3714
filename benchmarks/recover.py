"""Plans of the bundled pipeline by rounding alone and trained back: python -m benchmarks.recover --bits 2

2, 4 or 8 bits: a uniform plan. Any other average: allocated, for the least sum of error powers (sensitivities of plain
rounding from random probes). Activations 8 bit, BOS apart. Agreement with the caption, PSNR and SSIM against
full-precision pictures of the same noise, at 1 and 4 steps, for 256 captions that neither the pipeline nor the recovery
saw. The run is kept under --work and goes on there when it was stopped; options of ``recover`` are given as name=value.
Writes benchmarks/results/recover_<name>.json, and recover.md with a row of every such file there.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import resource
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixdq_ao import Plan, Sampling, allocate, analyze, calibrate, mixdq_config, quantize_, recover, save_quantized
from mixdq_ao.app.environment import environment
from mixdq_ao.app.measure import Exam, held_bytes
from mixdq_ao.app.quiet import silence_loading_bars
from mixdq_ao.app.subject import bundled
from mixdq_ao.jsonfile import write_document
from mixdq_ao.search.moments import input_moments
from mixdq_ao.search.roundings import rounded_as

from . import record

RESULTS = Path(__file__).parent / "results"
TEST, ANALYSIS = 256, 8
PLAIN = "minmax nearest"


class Subject:
    """The bundled pipeline, its examiners, and pictures of full precision."""

    def __init__(self, learned: int, test: int = TEST) -> None:
        shapes = bundled()
        silence_loading_bars()
        self.pipe = shapes.load_pipeline()
        self.full = copy.deepcopy(self.pipe.unet)
        self.learned = [p.text for p in shapes.prompts(learned, seed=909)]
        self.held_out = [p.text for p in shapes.prompts(24, seed=31, held_out=True)]
        self.calibrating = [p.text for p in shapes.prompts(32, seed=55)]
        self.calibration = calibrate(self.pipe, self.calibrating, steps=(1, 4))
        chosen, scorer = shapes.prompts(test, seed=2024, held_out=True), shapes.load_scorer()
        texts, specs = [p.text for p in chosen], [p.spec for p in chosen]
        self.exams = {
            steps: Exam(texts, specs, scorer, Sampling(steps=steps, seed=10_000, batch_size=64)) for steps in (1, 4)
        }
        self.reference: dict[int, torch.Tensor] = {}

    def grade(self, title: str, unet: nn.Module) -> dict[str, dict[str, float | None]]:
        """Of pictures that a UNet draws; the first one is full precision, which the others are compared with."""
        pipe, figures = copy.copy(self.pipe), {}
        object.__setattr__(pipe, "unet", unet)
        for steps, exam in self.exams.items():
            images = exam.draw(pipe, f"{title}, {steps} steps")
            grades = exam.grade(images, self.reference.setdefault(steps, images))
            figures[str(steps)] = grades
            picture = "" if grades["psnr"] is None else f" {grades['psnr']:.2f} dB SSIM {grades['ssim']:.4f}"
            print(f"{title}, {steps} steps: {grades['agreement']:.1%}{picture}", flush=True)
        return figures

    def bits(self, average: float, store: Path) -> Plan:
        """Bits of every layer: the same, or allocated from sensitivities that are kept in ``store``."""
        if average in (2, 4, 8):
            return Plan.uniform(self.pipe.unet, int(average), 8)
        store.parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"calibration": self.calibration, "batch_size": ANALYSIS, "store": store}
        found = analyze(self.pipe, self.calibrating[:ANALYSIS], method="probe", **options)
        return allocate(found, weight_bits=average, act_bits=8, objective="additive").plan

    def plan(self, plan: Plan, rounding: str) -> Plan:
        layers = {n: rounded_as(layer, rounding) for n, layer in plan.layers.items()}
        return plan.with_layers(layers).with_calibration(self.calibration)

    def moments(self, plan: Plan) -> Any:
        if not any(layer.needs_moment for layer in plan.layers.values()):
            return None
        return input_moments(self.pipe, self.calibrating, calibration=self.calibration, steps=(1, 4))

    def rounded(self, plan: Plan, moments: Any) -> nn.Module:
        unet = copy.deepcopy(self.full)
        quantize_(unet, mixdq_config(plan, moments=moments))
        return unet


def given(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=float, default=2, help="average of the weights' bits (default 2)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--start", default="mse nearest", help="range and rounding of the plan trained from")
    parser.add_argument("--prompts", type=int, default=768)
    parser.add_argument("--work", type=Path, default=Path("out/recover_benchmark"))
    parser.add_argument("--name", help="of the result (default w<bits>a8)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("options", nargs="*", type=given, metavar="name=value", help="options of recover")
    args = parser.parse_args()
    name = args.name or f"w{args.bits:g}a8"
    subject = Subject(args.prompts)
    bits = subject.bits(args.bits, args.work / "sensitivity.jsonl")
    plain, plan = subject.plan(bits, PLAIN), subject.plan(bits, args.start)
    moments = subject.moments(plan)

    def show(m):
        print({k: round(v, 6) for k, v in m.items()}, flush=True)

    found = recover(
        subject.pipe,
        plan,
        subject.learned,
        steps=args.steps,
        held_out=subject.held_out,
        moments=moments,
        checkpoint=args.work / name,
        on_evaluation=show,
        **dict(args.options),
    )
    save_quantized(subject.pipe.unet, args.work / f"unet-{name}", plan=found.plan)
    unets = {"full": subject.full, "recovered": subject.pipe.unet, "rounded": subject.rounded(plain, None)}
    unets["start"] = subject.rounded(plan, moments)
    figures = {title: subject.grade(title, unet) for title, unet in unets.items()}
    write_document(
        args.out / f"recover_{name}.json",
        {
            "command": record.command("benchmarks.recover"),
            "average_weight_bits": plan.summary(subject.full).average_weight_bits,
            "pictures": figures,
            "training": found.to_json() | {"recipe": found.plan.metadata["recovered"]["recipe"]},
            "bytes": held_bytes(subject.pipe.unet),
            "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "threads": torch.get_num_threads(),
            "prompts": {"learned": args.prompts, "held_out": len(subject.held_out), "test": TEST, "start": args.start},
            "environment": environment(),
        },
    )
    (args.out / "recover.md").write_text(table([json.loads(p.read_text()) for p in args.out.glob("recover_*.json")]))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: what each result was made with, and a row of it."""
    results = sorted(results, key=lambda r: r["average_weight_bits"])
    title = (__doc__ or "").split("\n\n")[1].replace("\n", " ").split(" The run is")[0]
    lines = [
        f"{title} Pairs are at 1 and 4 steps. Rounded: each channel's minimum and maximum, to nearest; start: the same "
        "bits with a better rounding, from which training starts; trained: as packed integers.",
        "",
        "| weight bits | bytes | agreement, %: full precision | rounded | start | trained | PSNR, dB: rounded | start "
        "| trained | steps, core minutes |",
        "|---" * 10 + "|",
        *map(_row, results),
        "",
        *(f"- {r['average_weight_bits']:.2f} bits, start {r['prompts']['start']}: `{r['command']}`" for r in results),
    ]
    return "\n".join(lines) + "\n"


def _row(result: dict[str, Any]) -> str:
    pictures, training = result["pictures"], result["training"]

    def pair(title, key, form, scale=1):
        return " / ".join(form % (scale * pictures[title][s][key]) for s in ("1", "4"))

    cells = [f"{result['average_weight_bits']:.2f}", f"{result['bytes']:,}"]
    cells += [pair(title, "agreement", "%.1f", 100) for title in ("full", "rounded", "start", "recovered")]
    cells += [pair(title, "psnr", "%.1f") for title in ("rounded", "start", "recovered")]
    return f"| {' | '.join(cells)} | {training['recipe']['steps']}, {training['core_seconds'] / 60:.0f} |"


if __name__ == "__main__":
    main()
