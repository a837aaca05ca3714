"""How costs grow with a model: python -m benchmarks.scaling [--out benchmarks/results] [--sizes 6]

Random UNets in SDXL's block structure (one resolution, 8 x 8 latent), once with more and more transformer blocks of the
same width (layers grow 64 times), once ever wider with the same layers (parameters grow 64 times). Seconds are of one
core, the least of three runs where one takes less than two seconds: analyze (one random probe, two prompts), allocate
(4 bits on average), quantize (rounding and packing all weights), compile by blocks (``compile_repeated_blocks``) and
whole (W4A8, to the end of the first call, without caches, as far as --whole layers). The exponent is the slope of
log seconds over log size in the larger half of the sizes and one below, with its 95 % interval. Writes scaling.json,
scaling.md and scaling.svg; finished sizes are kept in --work.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from scipy.stats import t
from torch import Tensor, nn

from mixdq_ao import Plan, allocate, analyze, calibrate, mixdq_config, quantize_
from mixdq_ao.app.environment import environment
from mixdq_ao.app.report.chart import LogScale, axes, marker
from mixdq_ao.app.report.html import Html, join, tag
from mixdq_ao.jsonfile import write_document
from mixdq_ao.layers import find_layers

from . import record

RESULTS = Path(__file__).parent / "results"
DEPTHS = (1, 3, 8, 20, 50, 110)
WIDTHS = (32, 64, 96, 144, 192, 256)
TOKENS, TEXT = 8, 32
STAGES = ("analyze", "allocate", "quantize", "compile by blocks", "compile whole")
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c6b4e")


class Toy:
    """A pipeline of one step: random noise, random but fixed embeddings, the UNet's output as a picture."""

    def __init__(self, depth: int, width: int) -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(width,), layers_per_block=1, transformer_layers_per_block=depth,
            attention_head_dim=width // 16, cross_attention_dim=TEXT, norm_num_groups=8, use_linear_projection=True,
        ).eval().requires_grad_(False)  # fmt: skip

    def inputs(self, latent: Tensor, texts: list[str]) -> dict[str, Any]:
        rows = [torch.randn(TOKENS, TEXT, generator=torch.Generator().manual_seed(int(text))) for text in texts]
        text = torch.stack(rows)
        return {"sample": latent, "timestep": torch.tensor(500), "encoder_hidden_states": text, "return_dict": False}

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **kwargs: Any) -> SimpleNamespace:
        latent = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generator])
        output = self.unet(**self.inputs(latent, prompt))[0]
        return SimpleNamespace(images=output[:, :3].repeat(1, 1, 2, 2).sigmoid())


def seconds(work: Callable[[], object]) -> float:
    """Of one core, with those of processes started and ended inside (compilers)."""
    least = math.inf
    for _ in range(3):
        before = _used()
        work()
        took = _used() - before
        least = min(least, took)
        if took > 2:
            break
    return least


def _used() -> float:
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


def compiled(unet: nn.Module, inputs: dict[str, Any], *, whole: bool) -> Callable[[], None]:
    """Compiles a copy and calls it; raises where what is compiled does not agree with what is not."""
    with torch.no_grad():
        expected = unet(**inputs)[0]

    @torch.no_grad()
    def work() -> None:
        torch._dynamo.reset()
        model: Any = copy.deepcopy(unet)
        if whole:
            model.compile(fullgraph=True)
        else:
            model.compile_repeated_blocks(fullgraph=True)
        error = ((model(**inputs)[0] - expected).norm() / expected.norm()).item()
        if not error < 0.05:
            raise SystemExit(f"compiled and eager differ by {error:.3f}")

    return work


def measure(depth: int, width: int, whole_up_to: int) -> dict[str, float]:
    pipe, texts = Toy(depth, width), ["1", "2"]
    unet = pipe.unet
    layers = find_layers(unet)
    calibration = calibrate(pipe, texts)
    found: dict[str, Any] = {}

    def probe() -> None:
        found["sensitivity"] = analyze(pipe, texts, method="probe", probes=1, calibration=calibration)

    def solve() -> None:
        found["plan"] = allocate(found["sensitivity"], weight_bits=4, act_bits=8, objective="additive").plan

    row: dict[str, float] = {"layers": len(layers), "parameters": sum(m.weight.numel() for m in layers.values())}
    row["analyze"], row["allocate"] = seconds(probe), seconds(solve)
    models = iter([copy.deepcopy(unet) for _ in range(3)])
    config = mixdq_config(Plan.uniform(unet, 4, 8).with_calibration(calibration))
    row["quantize"] = seconds(lambda: quantize_(next(models), config))
    quantize_(unet, config)
    inputs = pipe.inputs(torch.randn(2, 4, 8, 8), texts)
    row["compile by blocks"] = seconds(compiled(unet, inputs, whole=False))
    if len(layers) <= whole_up_to:
        row["compile whole"] = seconds(compiled(unet, inputs, whole=True))
    return row


def exponent(sizes: list[float], costs: list[float]) -> dict[str, float] | None:
    """Slope of log cost over log size where fixed costs weigh least, with its 95 % interval (Student's t)."""
    keep = max(3, len(sizes) // 2 + 1)
    if len(sizes) < 3:
        return None
    x, y = np.log(sizes[-keep:]), np.log(costs[-keep:])
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    variance = float(((y - slope * x) ** 2).sum() / (keep - 2) / (x @ x))
    half = float(t.ppf(0.975, keep - 2)) * math.sqrt(variance)
    return {"slope": slope, "low": slope - half, "high": slope + half}


def series(rows: list[dict[str, float]], by: str, stage: str) -> tuple[list[float], list[float]]:
    found = [(row[by], row[stage]) for row in rows if stage in row]
    return [x for x, _ in found], [y for _, y in found]


def exponents(growth: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    return {by: {s: exponent(*series(rows, by, s)) for s in STAGES} for by, rows in growth.items()}


def svg(growth: dict[str, list[dict[str, float]]]) -> str:
    """Two charts side by side, both axes logarithmic."""
    width, height = 430, 340
    style = tag(
        "style", Html("text{font:12px sans-serif;fill:#444}.gridline{stroke:#ddd}path{fill:none;stroke-width:2}")
    )
    parts: list[Html] = [style, tag("rect", width="100%", height="100%", fill="white")]
    every = [row[s] for rows in growth.values() for row in rows for s in STAGES if s in row]
    for k, (by, rows) in enumerate(growth.items()):
        x = LogScale.around([row[by] for row in rows], 62, width - 12)
        y = LogScale.around(every, height - 52, 34)
        drawn = [axes(x, y, by, "seconds of one core")]
        for i, stage in enumerate(STAGES):
            points = [(x(a), y(b)) for a, b in zip(*series(rows, by, stage), strict=True)]
            line = "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in points)
            marks = [marker(i, a, b, stage, "mark", 4) for a, b in points]
            drawn += [tag("g", tag("path", d=line), marks, stroke=COLOURS[i], fill=COLOURS[i])]
        parts.append(tag("g", drawn, transform=f"translate({k * width} 0)"))
    for i, stage in enumerate(STAGES):
        at = 66 + 160 * i
        parts.append(tag("g", marker(i, at, 14, stage, "mark", 4), fill=COLOURS[i]))
        parts.append(tag("text", stage, x=at + 10, y=18))
    size = {"width": 2 * width, "height": height, "viewBox": f"0 0 {2 * width} {height}"}
    return tag("svg", join(*parts), xmlns="http://www.w3.org/2000/svg", **size)


def markdown(growth: dict[str, list[dict[str, float]]], document: dict[str, Any]) -> str:
    e, lines = document["environment"], [(__doc__ or "").strip(), "", "![costs over size](scaling.svg)"]
    for by, rows in growth.items():
        lines += ["", "| layers | parameters | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 2) + "|"]
        for row in rows:
            cells = [f"{row[s]:.2f}" if s in row else "" for s in STAGES]
            lines.append(f"| {row['layers']:,} | {row['parameters']:,} | " + " | ".join(cells) + " |")
        fits = document["exponents"][by]
        cells = [f"{f['slope']:.2f} [{f['low']:.2f}, {f['high']:.2f}]" if (f := fits[s]) else "" for s in STAGES]
        lines.append(f"| **exponent** | over {by} | " + " | ".join(cells) + " |")
    where = f"{e['processor']}, {e['cpu_capability']}, torch {e['packages']['torch']}, commit {e['commit']}"
    return "\n".join([*lines, "", f"{where}; `{document['command']}`", ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, default=6, choices=range(2, 7), help="how many of the sizes, from below")
    parser.add_argument("--whole", type=int, default=150, help="most layers compiled as a whole")
    parser.add_argument("--work", type=Path, default=Path("out/scaling"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # compilers are then counted
    import torch._inductor.config as inductor

    inductor.force_disable_caches = True
    inductor.compile_threads = 1
    torch._dynamo.config.recompile_limit = 64
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.work / "rows.json"
    rows: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    shapes = {"layers": [(d, 32) for d in DEPTHS], "parameters": [(4, w) for w in WIDTHS]}
    growth: dict[str, list[dict[str, float]]] = {}
    torch.compile(torch.sin)(torch.ones(8))  # the compiler's own start
    for by, sizes in shapes.items():
        for depth, width in sizes[: options.sizes]:
            key = f"{depth} x {width}"
            if key not in rows:
                rows[key] = measure(depth, width, options.whole)
                write_document(kept, rows)
                print(key, rows[key], flush=True)
            growth.setdefault(by, []).append(rows[key])
    command = record.command("benchmarks.scaling")
    document = {"command": command, "rows": growth, "exponents": exponents(growth), "environment": environment()}
    write_document(options.out / "scaling.json", document)
    (options.out / "scaling.svg").write_text(svg(growth), encoding="utf-8")
    text = markdown(growth, document)
    (options.out / "scaling.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
