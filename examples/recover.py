"""Training a 2-bit UNet of the bundled pipeline back: python -m examples.recover --out out/recover

Quantizes every layer to 2 bits (8-bit activations), after which the UNet draws next to nothing, and distills the
full-precision UNet into it. Stores the packed UNet and pictures of full precision, rounding alone and the recovered
UNet. A stopped run continues when the command is run again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from examples.shapes import subject
from examples.shapes.pictures import save_grid
from mixdq_ao import Plan, Sampling, bos_aware, calibrate, mixdq_config, quantize_, recover, save_quantized
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.search.roundings import rounded_as
from mixdq_ao.training.recover_loop import decibel


def start_plan(pipe: Any, bits: int, texts: list[str]) -> Plan:
    """A uniform plan, with each channel's range at the least squared error of its weights: better than min-max."""
    plan = Plan.uniform(pipe.unet, bits, 8)
    layers = {n: rounded_as(layer, "mse nearest") for n, layer in plan.layers.items()}
    return plan.with_layers(layers).with_calibration(calibrate(pipe, texts, steps=(1, 4)))


def draw(pipe: Any, texts: list[str]) -> torch.Tensor:
    """Pictures at 1 and at 4 steps."""
    return torch.cat([generate_all(pipe, texts, Sampling(steps=steps, seed=7)) for steps in (1, 4)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, default=Path("out/recover"))
    parser.add_argument("--bits", type=int, default=2, choices=(2, 4))
    parser.add_argument("--steps", type=int, default=300, help="about a second each on one slow core")
    parser.add_argument("--prompts", type=int, default=512)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = subject.load_pipeline()
    texts = [p.text for p in subject.prompts(args.prompts, seed=909)]
    shown = [p.text for p in subject.prompts(16, seed=2024, held_out=True)]
    plan = start_plan(pipe, args.bits, texts[:32])
    save_grid(draw(pipe, shown), shown, args.out / "full.png")
    rounded = copy.copy(pipe)
    object.__setattr__(rounded, "unet", copy.deepcopy(pipe.unet))
    quantize_(rounded.unet, mixdq_config(plan))
    save_grid(draw(rounded, shown), shown, args.out / "rounded.png")

    def report(m: Mapping[str, float]) -> None:
        print(f"step {m['step']:5}: {decibel(m['error'])} of the output's power", flush=True)

    found = recover(
        pipe, plan, texts, steps=args.steps, checkpoint=args.out / "run", save_every=25, on_evaluation=report
    )
    bos_aware(pipe)
    save_grid(draw(pipe, shown), shown, args.out / "recovered.png")
    save_quantized(pipe.unet, args.out / "unet", plan=found.plan)
    print(f"{found.status}: {decibel(found.before)} by rounding, {decibel(found.real)} recovered, as packed integers")


if __name__ == "__main__":
    main()
