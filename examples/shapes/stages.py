"""The stages of training, in order; each reads the files of earlier ones from a folder, and adds its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from examples.shapes import outlier, tokenizer
from examples.shapes.cache import load_cache, make_cache
from examples.shapes.decoder import train_decoder
from examples.shapes.models import make_scheduler
from examples.shapes.scorer import train_scorer
from examples.shapes.text import TextEncoders, train_text
from examples.shapes.unet import train_unet
from examples.shapes.vae import train_vae

Report = Callable[[int, int, str], None]


def tokenizer_stage(out: Path, report: Report) -> dict:
    """Learns the tokenizer from captions and writes it twice, as SDXL has it."""
    built = tokenizer.build([out / "parts" / name for name in ("tokenizer", "tokenizer_2")])
    report(1, 1, f"{len(built)} pieces")
    return {"pieces": len(built)}


def text_stage(out: Path, report: Report) -> dict:
    """Trains both text encoders."""
    encoders, measured = train_text(_tokenizer(out), out / "checkpoints" / "text.pt", report)
    encoders.first.save_pretrained(out / "parts" / "text_encoder")
    encoders.second.save_pretrained(out / "parts" / "text_encoder_2")
    return measured


def scorer_stage(out: Path, report: Report) -> dict:
    """Trains the scorer, on drawn pictures alone."""
    scorer, measured = train_scorer(out / "checkpoints" / "scorer.pt", report)
    half = {name: v.half() if v.is_floating_point() else v for name, v in scorer.state_dict().items()}
    save_file(half, out / "scorer.safetensors")
    return measured


def vae_stage(out: Path, report: Report) -> dict:
    """Trains the autoencoder."""
    vae, measured = train_vae(out / "checkpoints" / "vae.pt", report)
    vae.save_pretrained(out / "parts" / "vae")
    return measured


def cache_stage(out: Path, report: Report) -> dict:
    """Computes the latents and embeddings that the UNet is trained on."""
    encoders = TextEncoders(*_encoders(out)).eval()
    vae = AutoencoderKL.from_pretrained(out / "parts" / "vae").eval()
    make_cache(out / "cache", _tokenizer(out), encoders, vae, report)
    return {}


def unet_stage(out: Path, report: Report) -> dict:
    """Trains the UNet."""
    unet, measured = train_unet(load_cache(out / "cache"), out / "checkpoints" / "unet.pt", report)
    unet.save_pretrained(out / "parts" / "unet")
    return measured


def decoder_stage(out: Path, report: Report) -> dict:
    """Sharpens the autoencoder's decoder."""
    vae = AutoencoderKL.from_pretrained(out / "parts" / "vae")
    measured = train_decoder(vae, out / "checkpoints" / "decoder.pt", report)
    vae.save_pretrained(out / "parts" / "vae")
    return measured


def outlier_stage(out: Path, report: Report) -> dict:
    """Makes the prompt rows hard to quantize, pictures unchanged; writes the finished pipeline in fp16."""
    first, second = _encoders(out)
    unet = UNet2DConditionModel.from_pretrained(out / "parts" / "unet")
    outlier.apply(first, second, unet, cast(int, _tokenizer(out).bos_token_id))
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(out / "parts" / "vae"),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=_tokenizer(out),
        tokenizer_2=CLIPTokenizer.from_pretrained(out / "parts" / "tokenizer_2"),
        unet=unet,
        scheduler=cast(Any, make_scheduler()),  # diffusers' hint is an enum of names
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.to(torch.float16).save_pretrained(out / "pipeline")
    _tidy(out)
    report(1, 1, str(out / "pipeline"))
    return {}


STAGES: dict[str, Callable[[Path, Report], dict]] = {
    "tokenizer": tokenizer_stage,
    "text": text_stage,
    "scorer": scorer_stage,
    "vae": vae_stage,
    "cache": cache_stage,
    "unet": unet_stage,
    "decoder": decoder_stage,
    "outlier": outlier_stage,
}
# the stages of a group run at the same time
GROUPS = (("tokenizer",), ("text", "scorer"), ("vae",), ("cache",), ("unet",), ("decoder",), ("outlier",))


def _tidy(out: Path) -> None:
    """Drops the paths of this machine from the configs, and adds the tokenizers' older files, as SDXL has them."""
    for path in (out / "pipeline").rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer", "tokenizer_2"):
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(out / "parts" / name / file, out / "pipeline" / name / file)


def _tokenizer(out: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(out / "parts" / "tokenizer")


def _encoders(out: Path) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    first = CLIPTextModel.from_pretrained(out / "parts" / "text_encoder")
    return first, CLIPTextModelWithProjection.from_pretrained(out / "parts" / "text_encoder_2")
