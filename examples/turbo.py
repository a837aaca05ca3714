"""A few-step model in 8-bit integers, without a search: python -m examples.turbo [PIPELINE] --steps 1 2 4

Distilled few-step models (SDXL-Turbo, SDXL-Lightning, LCM) break when every layer is quantized alike, because the first
text token stretches the ranges. If it is handled separately, 8 bits everywhere are enough. The default is the bundled
pipeline; try ``stabilityai/sdxl-turbo`` on a machine with enough memory.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from mixdq_ao import Plan, Sampling, bos_aware, calibrate, mixdq_config, quantize_
from mixdq_ao.app.inputs import load_pipeline
from mixdq_ao.models.pipelines import denoiser, generate_all
from mixdq_ao.search.metrics import psnr

PIPELINE = Path(__file__).parent / "shapes" / "pipeline"
PROMPTS = [  # the bundled model expects places and the background in a caption
    "a large red circle in the middle on a black background",
    "a small blue square at the bottom on a yellow background",
    "a green star above a white triangle on a grey background",
]


def compare(pipe: Any, prompts: list[str], counts: list[int], *, bos: bool | None = None) -> dict[int, float]:
    """{steps: PSNR in dB} of W8A8 against ``pipe``, which is unchanged. bos=False: no separate handling of BOS."""
    calibration = calibrate(pipe, prompts, steps=counts, bos=bos)
    plan = Plan.uniform(denoiser(pipe), 8, 8).with_calibration(calibration)
    quantized = copy.deepcopy(pipe)
    quantize_(denoiser(quantized), mixdq_config(plan))
    if plan.bos_embedding is not None:
        bos_aware(quantized)
    drawn = {steps: (Sampling(steps=steps, seed=2), prompts) for steps in counts}
    return {
        steps: psnr(generate_all(quantized, texts, how), generate_all(pipe, texts, how)).mean().item()
        for steps, (how, texts) in drawn.items()
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("pipeline", nargs="?", default=str(PIPELINE))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args(arguments)
    pipe = load_pipeline(args.pipeline)
    for title, bos in (("one range for everything", False), ("first token apart", None)):
        found = compare(pipe, PROMPTS, args.steps, bos=bos)
        print(f"W8A8, {title}: " + ", ".join(f"{psnr:.1f} dB at {steps}" for steps, psnr in found.items()) + " steps")


if __name__ == "__main__":
    main()
