"""Quantize a fine-tune of your own: python -m examples.finetune PIPELINE --prompts prompts.txt --out quantized

PIPELINE is a directory written by ``save_pretrained``, or a name on the hub. Measures ranges and sensitivities on your
prompts, chooses bits for this model, and stores a pipeline that ``DiffusionPipeline.from_pretrained`` loads (after
``import mixdq_ao``). Compares the pictures of both pipelines.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mixdq_ao import Sampling, allocate, analyze, bos_aware, calibrate, mixdq_config, quantize_
from mixdq_ao.app.inputs import load_pipeline, read_prompts
from mixdq_ao.models.pipelines import denoiser, generate_all
from mixdq_ao.models.serialization import save_pipeline
from mixdq_ao.search.metrics import psnr


def quantize_finetune(pipe: Any, prompts: list[str], out: Path, weight_bits: float, steps: int) -> dict[str, float]:
    """Quantizes ``pipe`` in place and stores it. Returns average bits, and PSNR in dB against full precision."""
    sampling = Sampling(steps=steps, seed=1)
    before = generate_all(pipe, prompts[:4], sampling)
    calibration = calibrate(pipe, prompts, steps=steps)
    sensitivity = analyze(pipe, prompts, calibration=calibration, method="probe", steps=steps)
    found = allocate(sensitivity, weight_bits=weight_bits, act_bits=8, objective="additive")
    plan = found.plan.with_calibration(calibration)
    quantize_(denoiser(pipe), mixdq_config(plan))
    if plan.bos_embedding is not None:
        bos_aware(pipe)
    after = generate_all(pipe, prompts[:4], sampling)
    save_pipeline(pipe, out, plan=plan)
    return {"bits": plan.summary(denoiser(pipe)).average_weight_bits, "psnr": psnr(after, before).mean().item()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("pipeline")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="what people ask of this model, one a line; 16 or more"
    )
    parser.add_argument("--out", type=Path, default=Path("quantized"))
    parser.add_argument("--weight-bits", type=float, default=4.0, help="on average")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps the model is used with")
    args = parser.parse_args(arguments)
    pipe = load_pipeline(args.pipeline)
    figures = quantize_finetune(pipe, read_prompts(args.prompts), args.out, args.weight_bits, args.steps)
    print(f"{args.out}: {figures['bits']:.2f} bits a weight, PSNR {figures['psnr']:.1f} dB against full precision")


if __name__ == "__main__":
    main()
