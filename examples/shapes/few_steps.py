"""An LCM-LoRA for the bundled pipeline: python -m examples.shapes.few_steps --out out/lcm_lora

With an empty prompt (text of zeros) the bundled UNet is a many-step model: one step gives a blur, twenty give pictures.
The adapter learns to predict from any point of a twenty-step path where the path ends, as a consistency model does
(Song et al. 2023, arXiv 2303.01469; as an adapter, LCM-LoRA: Luo et al. 2023, arXiv 2311.05556). The paths are computed
first, with DDIM, so the end of each is known; the papers learn it from neighbouring points instead.

A quarter of every batch has captions, whose pictures must not change. Takes five to ten minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from examples.shapes import subject

TARGETS = [  # the modules that LCM-LoRA adapts
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip
RANK, PATH, SEED = 8, 16, 11
AT = [999, 749, 499, 249]  # the timesteps of four LCM steps, which lie on the path
BATCH, CAPTIONED = 12, 3


def conditions(pipe: Any, texts: Sequence[str | None]) -> dict[str, Any]:
    """The UNet's text conditions: embeddings of each text, zeros for None."""
    embeddings, _, pooled, _ = pipe.encode_prompt([t or "-" for t in texts], do_classifier_free_guidance=False)
    asked = torch.tensor([t is not None for t in texts], dtype=embeddings.dtype)
    size = float(pipe.default_sample_size * pipe.vae_scale_factor)
    times = torch.tensor([[size, size, 0, 0, size, size]]).expand(len(texts), -1)
    added = {"text_embeds": pooled * asked[:, None], "time_ids": times}
    return {"encoder_hidden_states": embeddings * asked[:, None, None], "added_cond_kwargs": added}


def clean(pipe: Any, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """The clean latent x0 = alpha x - sigma v that a velocity v at (x, t) implies."""
    alpha = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    return alpha.sqrt() * x - (1 - alpha).sqrt() * velocity


@torch.no_grad()
def paths(pipe: Any, count: int, batch: int = 32) -> Tensor:
    """Points of ``count`` DDIM paths with the empty prompt: [PATH + 1, count, 4, 16, 16], noise first."""
    generator = torch.Generator().manual_seed(SEED)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(PATH)
    found = []
    for start in range(0, count, batch):
        n = min(batch, count - start)
        told = conditions(pipe, [None] * n)
        x = torch.randn(n, *subject.LATENT_SHAPE, generator=generator)
        points = [x]
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t, **told).sample, t, x).prev_sample
            points.append(x)
        found.append(torch.stack(points))
        print(f"paths: {start + n} of {count}", flush=True)
    return torch.cat(found, 1)


@torch.no_grad()
def drawings(pipe: Any, texts: list[str]) -> Tensor:
    """Latents drawn from captions in one step: [n, 4, 16, 16]."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(len(texts), *subject.LATENT_SHAPE, generator=generator)
    t = torch.full((len(texts),), 999)
    return clean(pipe, x, t, pipe.unet(x, t, **conditions(pipe, list(texts))).sample)


def train(pipe: StableDiffusionXLPipeline, *, count: int, steps: int, rate: float) -> dict[str, Tensor]:
    """The adapter's weights after ``steps`` batches over ``count`` paths; ``pipe.unet`` gets the adapter."""
    texts = [p.text for p in subject.prompts(128, seed=SEED)]
    known, drawn = paths(pipe, count), drawings(pipe, texts)
    times = pipe.scheduler.timesteps.tolist()
    usual = torch.tensor([min(range(PATH), key=lambda i: abs(times[i] - t)) for t in AT])
    torch.manual_seed(SEED)
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), "lcm")
    learnt = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = [p.detach().clone() for p in learnt]
    generator, start = torch.Generator().manual_seed(SEED), time.perf_counter()
    for step in range(steps):
        pick = torch.randint(count, (BATCH - CAPTIONED,), generator=generator)
        at = torch.where(
            torch.rand(len(pick), generator=generator) < 0.7,
            usual[torch.randint(len(usual), (len(pick),), generator=generator)],
            torch.randint(PATH, (len(pick),), generator=generator),
        )
        named = torch.randint(len(texts), (CAPTIONED,), generator=generator)
        t = torch.cat([torch.tensor(times)[at], torch.tensor(AT)[torch.randint(4, (CAPTIONED,), generator=generator)]])
        alpha = pipe.scheduler.alphas_cumprod[t[-CAPTIONED:]].view(-1, 1, 1, 1)
        noise = torch.randn(CAPTIONED, *subject.LATENT_SHAPE, generator=generator)
        x = torch.cat([known[at, pick], alpha.sqrt() * drawn[named] + (1 - alpha).sqrt() * noise])
        told = conditions(pipe, [None] * len(pick) + [texts[i] for i in named.tolist()])
        error = (
            clean(pipe, x, t, pipe.unet(x, t, **told).sample) - torch.cat([known[-1, pick], drawn[named]])
        ).square()
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad()
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        for a, p in zip(average, learnt, strict=True):
            a.lerp_(p.detach(), 1 / min(step + 1, 20))
        if step % 20 == 19:
            open_, named_ = error[:-CAPTIONED].mean().item(), error[-CAPTIONED:].mean().item()
            print(
                f"step {step + 1}: {open_:.4f}, of captions {named_:.4f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    with torch.no_grad():
        for a, p in zip(average, learnt, strict=True):
            p.copy_(a)
    return {k: v.half().contiguous() for k, v in get_peft_model_state_dict(pipe.unet, adapter_name="lcm").items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, default=Path("out/lcm_lora"))
    parser.add_argument("--paths", type=int, default=320)
    parser.add_argument("--steps", type=int, default=260)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    pipe = subject.load_pipeline()
    state: dict[str, Any] = {**train(pipe, count=args.paths, steps=args.steps, rate=args.rate)}
    pipe.save_lora_weights(args.out, unet_lora_layers=state)
    print(f"{args.out}: {sum(v.numel() for v in state.values())} weights")


if __name__ == "__main__":
    main()
