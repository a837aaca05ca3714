"""SDXL's UNet at its real size on a CPU: python -m benchmarks.sdxl --published FOLDER [--disk FOLDER]

2.57 billion random bfloat16 weights; the MixDQ authors' plans for SDXL-Turbo (weights of 4.00 bits, activations of 7.77
bits on average), read from their files, which are not part of this project; ranges from one full-precision run of
random inputs. Quantizes the model in place, runs it in real mode at a 64 x 64 latent, and reports the bytes its layers
hold against the plan's prediction, the most memory taken while quantizing and while running, and seconds. With --disk
the weights are written there and read again by a quantizing ``from_pretrained`` in a process of its own, which never
holds the 16-bit model. Writes benchmarks/results/sdxl.json.

A CPU without bfloat16 instructions multiplies bfloat16 hundreds of times slower than float32, so the full-precision run
multiplies in float32, one layer's weight at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.layouts import SDXL
from benchmarks.memory import Peak, anonymous, resident
from inductor_kernels import weights
from mixdq_ao import Plan, calibrate, mixdq_config, quantize_
from mixdq_ao.app.environment import environment
from mixdq_ao.app.measure import held_bytes
from mixdq_ao.app.quiet import silence_loading_bars
from mixdq_ao.jsonfile import write_document
from mixdq_ao.layers import find_layers
from mixdq_ao.search.metrics import sqnr

RESULTS = Path(__file__).parent / "results"
LATENT, TOKENS, OUTLIER = 64, 77, 823.0
"""The outlier is the largest value of SDXL's first text row (section 3.2 of arXiv 2405.17873)."""


def random_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """bfloat16 weights as torch initialises layers, made in place: at no time is there a float32 model."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    model = model.bfloat16().to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.reset_parameters()  # type: ignore[operator]
    return model


def inputs(model: UNet2DConditionModel, latent: int) -> dict[str, Any]:
    """One sample of noise and a text whose first row is an outlier, as CLIP's are."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    config: Any = model.config
    text = draw(1, TOKENS, config.cross_attention_dim)
    text[:, 0, 7] = OUTLIER
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    size = 8.0 * latent
    return {
        "sample": draw(1, config.in_channels, latent, latent),
        "timestep": torch.tensor(999),
        "encoder_hidden_states": text,
        "added_cond_kwargs": {
            "text_embeds": draw(1, pooled),
            "time_ids": torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.bfloat16),
        },
        "return_dict": False,
    }


def _multiply(module: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.float()
    if isinstance(module, nn.Linear):
        return F.linear(x.float(), module.weight.float(), bias).to(x.dtype)
    return module._conv_forward(x.float(), module.weight.float(), bias).to(x.dtype)


@contextmanager
def float32_products(model: nn.Module) -> Iterator[None]:
    """Inside, linear and convolution layers multiply in float32 and round to the model's type."""
    layers: list[Any] = list(find_layers(model).values())
    try:
        for module in layers:
            module.forward = partial(_multiply, module)
        yield
    finally:
        for module in layers:
            module.__dict__.pop("forward", None)


def widen_biases(model: nn.Module) -> None:
    """oneDNN adds a bfloat16 bias to a float32 sum in its reference code only, hundreds of times slower than the rest
    of the product on a CPU without AVX-512."""
    for module in find_layers(model).values():
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach().float(), requires_grad=False)


def published_plan(folder: Path) -> Plan:
    return Plan.from_mixdq_yaml(folder / "plan_weight_4.00.yaml", folder / "plan_act_7.77.yaml")


def in_place(
    plan: Plan, *, config: dict[str, Any] = SDXL, latent: int = LATENT, disk: Path | None = None
) -> dict[str, Any]:
    """Figures of quantizing in place; with ``disk`` the weights and the finished plan are left there."""
    base, start = anonymous(), time.perf_counter()
    model = random_unet(config)
    source = sum(p.numel() * p.element_size() for p in model.parameters())
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "source_bytes": source}
    figures["seconds"] = {"build": time.perf_counter() - start}
    feed, kept = inputs(model, latent), []
    start = time.perf_counter()
    with float32_products(model):
        calibration = calibrate(model, run=lambda: kept.append(model(**feed)[0]))
    figures["seconds"]["calibrate, float32 products"] = time.perf_counter() - start
    plan = plan.with_calibration(calibration)
    if disk is not None:
        model.save_pretrained(disk / "full", max_shard_size="500MB")
        plan.save(disk / "plan.json")
    summary = plan.summary(model)
    with Peak(base) as quantizing:
        quantize_(model, mixdq_config(plan))
    settled, held = anonymous() - base, held_bytes(model)
    widen_biases(model)
    with Peak(base) as running, torch.no_grad():
        output = model(**feed)[0]
    weights.weight_cache("memory")
    with Peak(base) as frugal, torch.no_grad():
        model(**feed)
    figures["seconds"] |= {"quantize": quantizing.seconds, "first forward, quantized": running.seconds}
    figures["seconds"]["forward, weights unpacked anew at each call"] = frugal.seconds
    return figures | {
        "average_bits": {"weight": summary.average_weight_bits, "act": summary.average_act_bits},
        "layers": {"weight": summary.counts, "act": summary.act_counts},
        "bos_layers": sum(layer.bos for layer in plan.layers.values()),
        "bytes_predicted": summary.bytes,
        "bytes_held": held,
        "process_after": settled,
        "peak_quantizing": quantizing.bytes,
        "peak_running": running.bytes,
        "peak_running, weights unpacked anew at each call": frugal.bytes,
        "sqnr": sqnr(kept[0], output),
        "finite": bool(torch.isfinite(output).all()),
    }


def from_disk(disk: Path) -> dict[str, Any]:
    """Figures of a quantizing ``from_pretrained`` of what ``in_place`` left, and of saving what it made."""
    from mixdq_ao.models import MixDQConfig

    config, base = MixDQConfig(disk / "plan.json"), anonymous()
    with Peak() as peak:
        model: Any = UNet2DConditionModel.from_pretrained(
            disk / "full", dtype=torch.bfloat16, quantization_config=config
        )
    settled, mapped = anonymous() - base, resident() - anonymous()
    with tempfile.TemporaryDirectory(dir=disk) as folder, Peak(base) as saving:
        model.save_pretrained(folder)
    return {
        "peak": peak.bytes,
        "peak, pages of mapped files included": peak.with_files,
        "process_after": settled,
        "mapped_after": mapped,
        "peak, saving included": max(peak.bytes, saving.bytes),
        "seconds": peak.seconds,
        "seconds_saving": saving.seconds,
        "bytes_held": held_bytes(model),
    }


def in_own_process(disk: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.sdxl", "--read", str(disk)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def shares(figures: dict[str, Any]) -> dict[str, float]:
    """What the goals are about, as parts of the 16-bit weights and of the prediction."""
    source = figures["source_bytes"]
    found = {
        "bytes_held / bytes_predicted": figures["bytes_held"] / figures["bytes_predicted"],
        "peak_quantizing / source_bytes": figures["peak_quantizing"] / source,
    }
    if "from_disk" in figures:
        for name in ("peak", "peak, saving included", "peak, pages of mapped files included"):
            found[f"from_disk {name} / source_bytes"] = figures["from_disk"][name] / source
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--published", type=Path, help="folder of plan_weight_4.00.yaml and plan_act_7.77.yaml")
    parser.add_argument("--disk", type=Path, help="an empty folder with room for 5.2 GB")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for sdxl.json")
    args = parser.parse_args()
    silence_loading_bars()
    if args.read is not None:
        print(json.dumps(from_disk(args.read)))
        return
    if args.published is None:
        parser.error("--published is needed: the folder that holds the authors' plans")
    figures = in_place(published_plan(args.published), disk=args.disk)
    if args.disk is not None:
        figures["from_disk"] = in_own_process(args.disk)
    header = {"command": "python -m benchmarks.sdxl --published FOLDER --disk FOLDER", "latent": LATENT}
    document = {**header, **figures, "shares": shares(figures), "environment": environment()}
    write_document(args.out / "sdxl.json", document)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
