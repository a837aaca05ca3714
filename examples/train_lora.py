"""An adapter trained on a quantized model (QLoRA): python -m examples.train_lora --out out/my_lora

    python -m examples.train_lora stabilityai/stable-diffusion-xl-base-1.0 --pictures my-pictures --bits 4

The base model is quantized first and its packed integers do not change; gradients flow through its layers into the
adapter alone (Dettmers et al. 2023, arXiv 2305.14314), which so learns with the rounding it will be used with. The
saved file loads into the full-precision model as well. ``--pictures`` is a folder of pictures, each with its caption in
a text file (``cat.png``, ``cat.txt``). Without it the bundled pipeline learns to draw everything on a black ground,
whatever the prompt.

Needs peft: pip install -c constraints.txt -e ".[lora]"
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from examples.shapes import data, subject
from examples.shapes.few_steps import TARGETS, conditions
from examples.shapes.pictures import save_grid
from mixdq_ao import MixDQError, Plan, Sampling, bos_aware, calibrate, mixdq_config, quantize_
from mixdq_ao.app.inputs import at_least, load_pipeline
from mixdq_ao.evaluate.resize import from_pillow
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.search.metrics import psnr
from mixdq_ao.textfile import read_text

Example = tuple[Tensor, str]  # picture [3, H, W] in [0, 1], caption
WARM = 20  # warm-up steps


def read_pictures(folder: Path, size: int) -> list[Example]:
    """Pictures with captions in a folder, cropped to squares of ``size`` pixels. Raises MixDQError naming the file."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    found = []
    for path in paths:
        caption = path.with_suffix(".txt")
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and caption.is_file():
            try:
                upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            except OSError as e:
                raise MixDQError(f"{path}: cannot be read as a picture: {e}") from e
            square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
            text = read_text(caption, MixDQError, "; expected a caption")
            found.append((from_pillow(square) / 255, text.strip()))
    if not found:
        raise MixDQError(f"{folder}: expected pictures (.png, .jpg, .webp), each with its caption in a .txt beside it")
    return found


def at_night(count: int, *, held_out: bool = False) -> list[Example]:
    """Examples for the bundled pipeline: its captions, with pictures on a black ground."""
    rng, asked = random.Random(3), subject.prompts(count, seed=31, held_out=held_out)
    return [(data.picture(replace(prompt.spec, ground="black"), rng, jitter=0), prompt.text) for prompt in asked]


@torch.no_grad()
def latents(pipe: Any, examples: list[Example]) -> Tensor:
    """Scaled latents of pictures, the x0 of training."""
    vae = pipe.vae
    encoded = [
        vae.encode((2 * picture[None] - 1).to(vae.device, vae.dtype)).latent_dist.mean for picture, _ in examples
    ]
    return torch.cat(encoded) * vae.config.scaling_factor


def wanted(scheduler: Any, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The denoiser's training target, by the scheduler's prediction type."""
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise MixDQError(f"the scheduler's prediction_type is {kind!r}, expected 'epsilon' or 'v_prediction'")
    return noise if kind == "epsilon" else scheduler.get_velocity(clean, noise, t)


def train(
    pipe: Any, examples: list[Example], *, times: list[int], steps: int, batch: int, rate: float, rank: int
) -> None:
    """Adds an adapter to ``pipe.unet`` and trains it on ``examples``."""
    unet, scheduler = pipe.unet, pipe.scheduler
    clean, captions = latents(pipe, examples), [caption for _, caption in examples]
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), "mine")
    cast_training_params(unet)  # the adapter's to float32, also where the model computes in 16 bits
    learnt = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.0)
    generator, start, losses = torch.Generator().manual_seed(5), time.perf_counter(), []
    for step in range(steps):
        pick = torch.randint(len(examples), (batch,), generator=generator)
        t = torch.tensor(times)[torch.randint(len(times), (batch,), generator=generator)].to(clean.device)
        noise = torch.randn(batch, *clean.shape[1:], generator=generator).to(clean)
        with torch.no_grad():
            told = conditions(pipe, [captions[i] for i in pick.tolist()])
        goal = wanted(scheduler, clean[pick], noise, t)
        x = scheduler.add_noise(clean[pick], noise, t)
        loss = F.mse_loss(unet(x, t, **told).sample.float(), goal.float())
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARM) * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 19:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}: loss {sum(losses[-20:]) / 20:.4f}, {seconds:.0f} s", flush=True)


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.train_lora", description=(__doc__ or "").split(":")[0])
    add = parser.add_argument
    add("pipeline", nargs="?", default=str(subject.PIPELINE), help="directory, or name on the hub (default: bundled)")
    add("--pictures", type=Path, help="folder of cat.png, cat.txt with its caption, ... (default: shapes on black)")
    add("--bits", type=int, default=4, choices=(16, 8, 4), help="of weights (default 4); 16: nothing is quantized")
    add("--times", type=at_least(1), nargs="+", help="timesteps to train at (default: all; bundled: those of 4 steps)")
    add("--steps", type=at_least(1), default=200, help="batches (default 200)")
    add("--batch", type=at_least(1), default=8, help="pictures at a time (default 8)")
    add("--rate", type=float, default=2e-3, help="learning rate at its highest (default 2e-3)")
    add("--rank", type=at_least(1), default=8, help="of the adapter (default 8)")
    add("--out", type=Path, default=Path("out/my_lora"), help="directory to write to (default out/my_lora)")
    return parser.parse_args(arguments)


def times_of(args: argparse.Namespace, scheduler: Any) -> list[int]:
    """Random timesteps to train at."""
    count = scheduler.config.num_train_timesteps
    if args.times and max(args.times) >= count:
        raise MixDQError(f"--times {max(args.times)}: expected less than {count}, which the scheduler has")
    few = args.pictures is None and args.pipeline == str(subject.PIPELINE)
    return args.times or ([999, 749, 499, 249] if few else list(range(count)))


def main(arguments: list[str] | None = None) -> None:
    args = arguments_of(arguments)
    try:
        run(args)
    except MixDQError as e:
        raise SystemExit(f"error: {e}") from None


def run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()  # else diffusers warns about each text encoder that the adapter does not contain
    pipe = load_pipeline(args.pipeline)
    times = times_of(args, pipe.scheduler)
    size = pipe.default_sample_size * pipe.vae_scale_factor
    examples = read_pictures(args.pictures, size) if args.pictures else at_night(256)
    asked = examples[:4] if args.pictures else at_night(16, held_out=True)
    texts, sampling = [caption for _, caption in asked], Sampling(steps=4, seed=8)
    if args.bits < 16:
        calibration = calibrate(pipe, [caption for _, caption in examples[:64]], steps=4)
        quantize_(pipe.unet, mixdq_config(Plan.uniform(pipe.unet, args.bits, 8).with_calibration(calibration)))
        if calibration.bos_embedding is not None:
            bos_aware(pipe)
    before = generate_all(pipe, texts, sampling)
    train(pipe, examples, times=times, steps=args.steps, batch=args.batch, rate=args.rate, rank=args.rank)
    state: dict[str, Any] = {**get_peft_model_state_dict(pipe.unet, adapter_name="mine")}
    pipe.save_lora_weights(args.out, unet_lora_layers=state)
    after = generate_all(pipe, texts, sampling)
    save_grid(torch.cat([before, after]), texts, args.out / "before_after.png")
    goal = torch.stack([picture for picture, _ in asked])
    old, new = (psnr(pictures, goal).mean().item() for pictures in (before, after))
    print(f"PSNR to the pictures asked for: {old:.1f} dB before, {new:.1f} dB after")
    print(f"{args.out}: {sum(v.numel() for v in state.values())} weights")


if __name__ == "__main__":
    main()
