"""A FLUX transformer in 4 and 8 bits: python -m examples.flux black-forest-labs/FLUX.1-schnell --out quantized

By default bits follow a rule, and only ranges are measured: the blocks' weights get `--bits`; the layers before and
after the blocks, and those that scale and shift the blocks' inputs, get 8. `--how probes` estimates each layer's effect
on the output with a few backward passes, and chooses bits of that average. `DiffusionPipeline.from_pretrained` loads
the result (after ``import mixdq_ao``). Without a pipeline, a small model of random weights shows that everything runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from mixdq_ao import Plan, Sampling, allocate, analyze, calibrate, mixdq_config, quantize_
from mixdq_ao.app.inputs import load_pipeline, read_prompts
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.models.serialization import save_pipeline
from mixdq_ao.search.metrics import psnr

TOKENIZER = Path(__file__).parent / "shapes" / "pipeline" / "tokenizer"
PROMPTS = ["a large red circle", "a small blue square on a yellow background"]
WIDTH, POOLED = 32, 48


def small_pipeline() -> FluxPipeline:
    """A pipeline of FLUX's layout at toy size: two joint blocks, two single blocks, random weights."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=POOLED, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    t5 = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    vae: Any = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "shift_factor": 0.0}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(**vae),
        text_encoder=CLIPTextModel(clip).eval(), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(), tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, axes_dims_rope=(4, 4, 8),
        ).eval(),
    )  # fmt: skip


def by_rule(model: torch.nn.Module, bits: int) -> Plan:
    """A plan with ``bits`` for attention and feed-forward of the blocks, 8 for all other layers, 8-bit activations."""
    wide = Plan.uniform(model, 8, 8).layers

    def inside(n: str) -> bool:
        return "transformer_blocks." in n and "norm" not in n

    return Plan.uniform(model, bits, 8).with_layers({n: layer for n, layer in wide.items() if not inside(n)})


def quantize_flux(
    pipe: Any,
    prompts: Sequence[str],
    *,
    how: str = "rule",
    bits: float = 4,
    steps: int = 4,
    probes: int | None = None,
) -> Plan:
    """Quantizes ``pipe.transformer`` in place; returns the plan. ``probes``: backward passes per batch; None for as
    many as a stable ranking takes."""
    calibration = calibrate(pipe, prompts, steps=steps)
    if how == "rule":
        plan = by_rule(pipe.transformer, int(bits))
    else:
        found = analyze(pipe, prompts, calibration=calibration, method="probe", steps=steps, probes=probes)
        plan = allocate(found, weight_bits=bits, act_bits=8, objective="additive").plan
    plan = plan.with_calibration(calibration)
    quantize_(pipe.transformer, mixdq_config(plan))
    return plan


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("pipeline", nargs="?", help="directory, or name on the hub (default: small and random)")
    parser.add_argument("--prompts", type=Path, help="one a line")
    parser.add_argument("--how", choices=("rule", "probes"), default="rule")
    parser.add_argument("--probes", type=int, help="backward passes a batch (default: until the ranking is steady)")
    parser.add_argument("--bits", type=float, default=4, help="of the blocks' weights; with probes, of all on average")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps the model is used with")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="the repeated blocks")
    parser.add_argument("--out", type=Path, default=Path("out/flux"))
    args = parser.parse_args(arguments)
    prompts = read_prompts(args.prompts) if args.prompts else PROMPTS
    pipe = small_pipeline() if args.pipeline is None else load_pipeline(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    size = None if args.pipeline else 32
    sampling = Sampling(steps=args.steps, seed=1, height=size, width=size)
    before = generate_all(pipe, prompts[:2], sampling)
    options = {"how": args.how, "bits": args.bits, "steps": args.steps, "probes": args.probes}
    plan = quantize_flux(pipe, prompts, **options)
    save_pipeline(pipe, args.out, plan=plan)
    if args.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=args.compile)
    after = generate_all(pipe, prompts[:2], sampling)
    print(plan.summary(pipe.transformer))
    print(f"{args.out}: PSNR {psnr(after, before).mean():.1f} dB against full precision")


if __name__ == "__main__":
    main()
