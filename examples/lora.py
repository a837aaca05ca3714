"""LoRA on a quantized pipeline: python -m examples.lora --out out/lora

The steps that LCM-LoRA takes to turn any SDXL into a few-step model, on the bundled pipeline with random adapters made
here: calibrate in full precision with the adapter fused, quantize the model without it, load the adapter on top. Then
the adapter is scaled, swapped for a second one, fused into the packed weights and removed again. `--adapter` uses one
of yours. Needs peft: pip install -c constraints.txt -e ".[lora]"
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from examples.shapes import subject
from examples.shapes.pictures import save_grid
from mixdq_ao import Plan, Sampling, bos_aware, calibrate, mixdq_config, quantize_
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.search.metrics import psnr

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv2"]
RANK, SIZE = 4, 1.0  # of the random adapters: large enough to see, small enough to keep the pictures recognizable


def random_adapter(pipe: Any, directory: Path, seed: int) -> Path:
    """Writes an adapter of linear and convolution layers as diffusers saves them."""
    torch.manual_seed(seed)
    unet = copy.deepcopy(pipe.unet)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False))
    state = {name: SIZE * tensor for name, tensor in get_peft_model_state_dict(unet, adapter_name="default").items()}
    pipe.save_lora_weights(directory, unet_lora_layers=state)
    return directory


def with_unet(pipe: Any, unet: torch.nn.Module) -> Any:
    """A shallow copy of the pipeline that holds another UNet."""
    clone = copy.copy(pipe)
    object.__setattr__(clone, "unet", unet)
    return clone


def calibrated_plan(pipe: Any, adapter: Path, texts: list[str], bits: int) -> Plan:
    """A plan with the ranges of the model *with* the adapter, which its layers will see."""
    fused = with_unet(pipe, copy.deepcopy(pipe.unet))
    fused.load_lora_weights(adapter)
    fused.unet.fuse_lora()
    fused.unet.unload_lora()
    return Plan.uniform(fused.unet, bits, 8).with_calibration(calibrate(fused, texts, steps=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, default=Path("out/lora"))
    parser.add_argument("--adapter", type=Path, help="directory or file of an adapter (default: random numbers)")
    parser.add_argument("--bits", type=int, default=8, choices=(8, 4))
    parser.add_argument("--prompts", type=int, default=4)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()  # else diffusers warns about each text encoder that the adapter does not contain
    pipe = subject.load_pipeline()
    texts = [p.text for p in subject.prompts(args.prompts, seed=2024, held_out=True)]
    sampling = Sampling(steps=1, seed=7)
    first = args.adapter or random_adapter(pipe, args.out / "first", seed=1)
    second = random_adapter(pipe, args.out / "second", seed=2)

    plan = calibrated_plan(pipe, first, [p.text for p in subject.prompts(16, seed=909)], args.bits)
    quantized = with_unet(pipe, copy.deepcopy(pipe.unet))
    quantize_(quantized.unet, mixdq_config(plan))
    bos_aware(quantized)
    plain = generate_all(quantized, texts, sampling)

    def show(what: str, adapter: Path | None = None, scale: float = 1.0) -> torch.Tensor:
        """Draws, and prints the PSNR against pictures without the adapter and against full precision with it."""
        pictures = generate_all(quantized, texts, sampling)
        moved = psnr(pictures, plain).mean()
        line = f"{what:32} to the model without {moved:5.1f} dB"
        if adapter is not None:
            full = with_unet(pipe, copy.deepcopy(pipe.unet))
            full.load_lora_weights(adapter, adapter_name="full")
            full.unet.set_adapters("full", scale)
            exact = generate_all(full, texts, sampling)
            line += f", to full precision with it {psnr(pictures, exact).mean():5.1f} dB"
        print(line, flush=True)
        return pictures

    if args.adapter is None:  # a second adapter is swapped in below, which must be declared before loading the first
        quantized.unet.enable_lora_hotswap(target_rank=RANK, check_compiled="ignore")
    quantized.load_lora_weights(first, adapter_name="one")
    pictures = show("loaded", first)
    quantized.unet.set_adapters("one", 0.5)
    show("scale 0.5", first, 0.5)
    quantized.unet.set_adapters("one", 1.0)
    quantized.unet.fuse_lora()
    save_grid(show("fused into the packed weights", first), texts, args.out / "fused.png")
    quantized.unet.unfuse_lora()
    assert torch.equal(show("taken out of the weights again", first), pictures)
    save_grid(pictures, texts, args.out / "loaded.png")
    if args.adapter is None:
        quantized.load_lora_weights(second, adapter_name="one", hotswap=True)
        show("another one swapped in", second)
    quantized.unet.unload_lora()
    assert torch.equal(show("without any"), plain)


if __name__ == "__main__":
    main()
