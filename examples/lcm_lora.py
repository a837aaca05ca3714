"""LCM-LoRA: a quantized many-step SDXL draws in few steps: python -m examples.lcm_lora --out out/lcm_lora

    python -m examples.lcm_lora stabilityai/stable-diffusion-xl-base-1.0 --lora latent-consistency/lcm-lora-sdxl \
        --prompts prompts.txt --guidance 5 --many 25

Calibrates the full-precision model with the adapter fused, quantizes the model without it, and loads the adapter on top
of the packed weights (LCM-LoRA: Luo et al. 2023, arXiv 2311.05556). Without arguments it uses the bundled pipeline,
which needs twenty steps for an empty prompt, and the adapter that `examples/shapes/few_steps.py` trained for that.

Needs peft: pip install -c constraints.txt -e ".[lora]"
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from diffusers.utils import logging
from torch import Tensor

from examples.lora import with_unet
from examples.shapes.pictures import save_grid
from mixdq_ao import Plan, bos_aware, calibrate, mixdq_config, quantize_
from mixdq_ao.app.inputs import load_pipeline, read_prompts
from mixdq_ao.search.metrics import psnr

SHAPES = Path(__file__).parent / "shapes"
NOTHING = ""  # the empty prompt, encoded as zeros


def draw(pipe: Any, texts: Sequence[str], steps: int, guidance: float = 0.0) -> Tensor:
    """Pictures [n, 3, H, W] in [0, 1], picture i from the noise of seed i."""
    told, _, pooled, _ = pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)
    asked = torch.tensor([text != NOTHING for text in texts], dtype=told.dtype, device=told.device)
    return pipe(
        prompt_embeds=told * asked[:, None, None],
        pooled_prompt_embeds=pooled * asked[:, None],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(i) for i in range(len(texts))],
        output_type="pt",
    ).images


def few_step_plan(pipe: Any, lora: str, texts: Sequence[str], bits: int, steps: int) -> Plan:
    """A uniform plan with the ranges of the model *with* the adapter, over a few steps of its scheduler."""
    fused = with_unet(pipe, copy.deepcopy(pipe.unet))
    fused.load_lora_weights(lora)
    fused.unet.fuse_lora()
    fused.unet.unload_lora()
    plan = Plan.uniform(fused.unet, bits, 8)
    return plan.with_calibration(calibrate(fused.unet, run=lambda: draw(fused, texts, steps)))


def few_step(pipe: Any, lora: str, texts: Sequence[str], *, bits: int = 8, steps: int = 4) -> Any:
    """A copy of ``pipe`` with a quantized UNet and the adapter on top; ``pipe`` itself only gets LCM's scheduler."""
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    plan = few_step_plan(pipe, lora, texts, bits, steps)
    quantized = with_unet(pipe, copy.deepcopy(pipe.unet))
    quantize_(quantized.unet, mixdq_config(plan))
    if plan.bos_embedding is not None:
        bos_aware(quantized)
    quantized.load_lora_weights(lora, adapter_name="lcm")
    return quantized


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("pipeline", nargs="?", default=str(SHAPES / "pipeline"), help="directory, or name on the hub")
    parser.add_argument("--lora", default=str(SHAPES / "lcm_lora"), help="directory, file, or name on the hub")
    parser.add_argument("--prompts", type=Path, help="one a line (default: nothing, 8 times, and 4 captions)")
    parser.add_argument("--bits", type=int, default=8, choices=(8, 4))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--many", type=int, default=20, help="steps of the model as it is, to compare with")
    parser.add_argument("--guidance", type=float, default=0.0, help="of the model as it is")
    parser.add_argument("--compile", action="store_true", help="minutes on a CPU")
    parser.add_argument("--out", type=Path, default=Path("out/lcm_lora"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()  # else diffusers warns about each text encoder that the adapter does not contain
    texts = read_prompts(args.prompts) if args.prompts else [NOTHING] * 8 + captions(4)
    pipe = load_pipeline(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    many = draw(pipe, texts, args.many, args.guidance)
    quantized = few_step(pipe, args.lora, texts, bits=args.bits, steps=args.steps)
    if args.compile:
        quantized.unet = torch.compile(quantized.unet, fullgraph=True)
    drawn = {
        "without the adapter": draw(pipe, texts, args.steps),
        "with it, quantized": draw(quantized, texts, args.steps),
    }
    pipe.load_lora_weights(args.lora, adapter_name="lcm")
    drawn["with it, full precision"] = draw(pipe, texts, args.steps)
    for what, pictures in drawn.items():
        near = psnr(pictures, many).mean()
        print(f"{args.steps} steps {what:24} {near:5.1f} dB to {args.many} steps of the model as it is")
    exact = psnr(drawn["with it, quantized"], drawn["with it, full precision"]).mean()
    print(f"quantized to full precision, both with the adapter: {exact:.1f} dB")
    shown = torch.cat([many, drawn["without the adapter"], drawn["with it, quantized"]])
    save_grid(shown, [text or "(nothing)" for text in texts], args.out / "lcm_lora.png")


def captions(count: int) -> list[str]:
    from examples.shapes.subject import prompts

    return [prompt.text for prompt in prompts(count, seed=5, held_out=True)]


if __name__ == "__main__":
    main()
