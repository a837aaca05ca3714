"""A folder of results like the demo's, made up: for tests of the report and for looking at it.

python -m tests.app.synthetic FOLDER    writes one, with its report
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from mixdq_ao.plan import LayerPlan, Plan
from mixdq_ao.search.sensitivity import LayerSensitivity, Sensitivity

HOSTILE = "<script>alert('x')</script>"
BLOCK = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v")
BLOCK += ("attn2.to_out.0", "ff.net.0.proj", "ff.net.2")


def layer_names() -> list[str]:
    """The layout of the bundled UNet."""
    names = ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1"]
    names += ["add_embedding.linear_2", *_block("down_blocks.0", 1, 0, 0, "downsamplers")]
    names += [*_block("down_blocks.1", 1, 1, 1, "downsamplers"), *_block("down_blocks.2", 1, 1, 2, "")]
    names += _block("mid_block", 2, 1, 2, "")
    names += [*_block("up_blocks.0", 2, 2, 2, "upsamplers"), *_block("up_blocks.1", 2, 2, 1, "upsamplers")]
    return [*names, *_block("up_blocks.2", 2, 0, 0, ""), "conv_out"]


def _block(name: str, resnets: int, attentions: int, depth: int, sampler: str) -> list[str]:
    names = []
    for i in range(resnets):
        names += [f"{name}.resnets.{i}.{part}" for part in ("conv1", "time_emb_proj", "conv2")]
        names += (
            [f"{name}.resnets.{i}.conv_shortcut"] if name.startswith(("up", "down_blocks.1", "down_blocks.2")) else []
        )
    for i in range(attentions):
        at = f"{name}.attentions.{i}"
        inner = [f"{at}.transformer_blocks.{d}.{part}" for d in range(depth) for part in BLOCK]
        names += [f"{at}.proj_in", *inner, f"{at}.proj_out"]
    return names + ([f"{name}.{sampler}.0.conv"] if sampler else [])


def sensitivity(names: list[str]) -> Sensitivity:
    rng = random.Random(0)
    return Sensitivity({name: _layer(name, rng) for name in names}, {"prompts": 16})


def _layer(name: str, rng: random.Random) -> LayerSensitivity:
    content = "attn2" in name or ".ff." in name
    size = rng.choice((9216, 20736, 43008, 82944))
    base = rng.gauss(22, 5)
    decibel = {b: base + 5.6 * b - 8 for b in (2, 4, 8)}
    show = (lambda d: 1 - 10 ** (-d / 12)) if content else (lambda d: d)
    return LayerSensitivity(
        group="content" if content else "quality",
        weight_size=size,
        act_size=size // 4,
        weight_scores={b: show(d) for b, d in decibel.items()},
        act_scores={b: show(base + 5 * b - 4) for b in (4, 8)},
        weight_errors={b: 10 ** (-d / 10) for b, d in decibel.items()},
        act_errors={b: 10 ** (-(base + 5 * b - 4) / 10) for b in (4, 8)},
        weight_bytes={b: size * b // 8 + 5 * 96 for b in (2, 4, 8)},
    )


def plan(found: Sensitivity, target: float) -> Plan:
    """More bits for the layers that suffer more."""
    order = sorted(found.layers, key=lambda n: found.layers[n].weight_errors[4], reverse=True)
    layers = {}
    for place, name in enumerate(order):
        share = place / len(order)
        bits = 8 if share < (target - 3) / 5 or target == 8 else 4 if share < (target - 2) / 2.3 else 2
        kept = name in ("conv_in", "conv_out")
        layers[name] = LayerPlan(weight_bits=16 if kept else bits, act_bits=16 if kept else 8)
    return Plan({name: layers[name] for name in found.layers}, {"source": "made up"})


def _figures(agreement, ssim, psnr, frechet, size, bits, act, latency) -> dict[str, float | None]:
    return {
        "agreement": agreement,
        "ssim": ssim,
        "psnr": psnr,
        "frechet": frechet,
        "weight_bytes": size,
        "average_weight_bits": bits,
        "average_act_bits": act,
        "latency_ms": latency,
        "speedup": None if latency is None else 92.4 / latency,
    }


def results() -> dict[str, object]:
    variants = {
        "fp32": _figures(0.988, 1.0, None, 0.0, 12_400_000, 32.0, 32.0, 92.4),
        "naive_w8a8": _figures(0.031, 0.4312, 11.2, 41.7, 3_180_000, 8.0, 8.0, 63.1),
        "bos_w8a8": _figures(0.984, 0.9931, 45.4, 0.021, 3_190_000, 8.0, 8.0, 63.9),
        "mixdq_w8a8": _figures(0.988, 0.9978, 50.2, 0.007, 3_240_000, 8.03, 8.1, 64.0),
        "naive_w4a8": _figures(0.0, 0.3801, 10.1, 55.2, 1_640_000, 4.0, 8.0, 61.7),
        "bos_w4a8": _figures(0.965, 0.9511, 34.1, 0.62, 1_650_000, 4.0, 8.0, 62.3),
        "mixdq_w4a8": _figures(0.988, 0.9941, 46.7, 0.018, 1_648_000, 4.0, 8.0, 62.9),
        "mixdq_w3a8": _figures(0.984, 0.9902, 44.3, 0.035, 1_260_000, 3.0, 8.0, 62.1),
    }
    ablation = {
        "additive_w4a8": _figures(0.988, 0.9941, 46.7, 0.018, 1_648_000, 4.0, 8.0, None),
        "decoupled_w4a8": _figures(0.984, 0.9899, 43.1, 0.05, 1_648_500, 4.0, 8.0, None),
        "sqnr_w4a8": _figures(0.977, 0.9823, 40.9, 0.11, 1_648_100, 4.0, 8.0, None),
    }
    environment = {
        "python": "3.11.7",
        "processor": "Imaginary CPU 9000",
        "vnni": True,
        "gpu": None,
        "packages": {"torch": "2.13.0", "torchao": "0.18.0"},
        "threads": 2,
        "commit": "0123abc",
        "prompts": 256,
    }
    return {"variants": variants, "variants_1_step": variants, "ablation": ablation, "environment": environment}


def pareto() -> dict[str, object]:
    rng = random.Random(1)
    points = []
    for objective, offset in (("additive", 0.0), ("decoupled", -3.0), ("sqnr", -4.5)):
        for bits in (2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0, 6.0):
            psnr = 30 + offset + 13 * math.log2(bits) / 2 + rng.gauss(0, 0.7)
            point = {
                "objective": objective,
                "weight_bits": bits,
                "weight_bytes": int(bits * 410_000 + rng.random() * 9e4),
            }
            points.append(
                point
                | {"predicted_error": 10 ** (-psnr / 10), "measured_error": 1.1 * 10 ** (-psnr / 10)}
                | {"psnr": psnr, "ssim": None, "agreement": None}
            )
    return {"points": points}


def grid(directory: Path, columns: list[str], rows: list[str], cell: int = 64, gap: int = 4) -> None:
    sheet = Image.new("RGB", ((cell + gap) * len(columns), (cell + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for c in range(len(columns)):
        for r in range(len(rows)):
            x, y = c * (cell + gap), r * (cell + gap)
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=(40 + 20 * c, 90, 200 - 20 * r))
            draw.ellipse((x + 12, y + 12, x + 40 + r, y + 40 + r), fill=(240, 200 - 20 * c, 60))
    sheet.save(directory / "grid.png")
    document = {"columns": columns, "rows": rows, "cell": [cell, cell], "origin": [0, 0], "gap": gap}
    (directory / "grid.json").write_text(json.dumps(document))


def write(directory: Path, names: list[str] | None = None) -> Path:
    """A complete folder; ``names``: its layers."""
    directory.mkdir(parents=True, exist_ok=True)
    found, measured = sensitivity(names or layer_names()), results()
    (directory / "results.json").write_text(json.dumps(measured))
    (directory / "pareto.json").write_text(json.dumps(pareto()))
    found.save(directory / "sensitivity.json")
    for bits in (8, 4, 3):
        plan(found, bits).save(directory / f"plan_w{bits}a8.json")
    captions = ["a large red circle on a white background", "two small blue squares, one above the other"]
    grid(directory, list(measured["variants"]), [*captions, f"a green {HOSTILE} triangle"])  # type: ignore[call-overload]
    return directory


if __name__ == "__main__":
    from mixdq_ao.app.report import build

    print(build(write(Path(sys.argv[1]))))
