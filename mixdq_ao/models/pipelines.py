"""The parts of a diffusers pipeline, and reproducible sampling of pictures or latents from prompts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..compat import uncompiled
from ..errors import MixDQError
from ..expect import is_number

SIZES = ("height", "width", "frames")
PICTURES = ("image", "mask_image", "control_image", "video")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to sample pictures.

    Attributes:
        steps: denoising steps.
        guidance_scale: classifier-free guidance; 0 turns it off, as few-step models require.
        seed: prompt i of a list starts from noise of a generator with seed + i, whatever the batch size.
        batch_size: prompts per batch.
        height, width: in pixels; None for the model's default.
        frames: of a video; None for the pipeline's default, and for pictures.
    """

    steps: int = 1
    guidance_scale: float = 0.0
    seed: int = 0
    batch_size: int = 16
    height: int | None = None
    width: int | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "height", "width", "frames", "seed"):
            value = getattr(self, name)
            if value is None and name in SIZES:
                continue
            if type(value) is not int or (value < 1 and name != "seed"):
                least = "" if name == "seed" else " of at least 1"
                several = "; only calibrate and input_moments take several counts" * isinstance(value, list | tuple)
                raise MixDQError(f"{name} is {value!r}, expected a whole number{least}{several}")
        _check_seed(self.seed)
        if not is_number(self.guidance_scale) or not math.isfinite(self.guidance_scale):
            raise MixDQError(f"guidance_scale is {self.guidance_scale!r}, expected a finite number; 0 turns it off")

    def size(self) -> dict[str, int]:
        """Height, width and frames, without those that are None."""
        return {name: value for name in SIZES if (value := getattr(self, name)) is not None}


def _check_seed(seed: int) -> None:
    """Raises MixDQError for a seed that torch does not accept."""
    if not -(2**63) <= seed < 2**64:
        raise MixDQError(f"seed is {seed}, expected a whole number from -2^63 to 2^64 - 1, also for the last prompt")


def denoiser(pipe: Any) -> nn.Module:
    """The model of ``pipe`` to quantize: ``pipe.unet``, or ``pipe.transformer`` (the first, if there are two)."""
    name = _name_of_denoiser(pipe)
    if name is None:
        raise MixDQError(f"{type(pipe).__name__} has neither a unet nor a transformer; pass the model itself")
    return getattr(pipe, name)


def _name_of_denoiser(pipe: Any) -> str | None:
    """The attribute of a pipeline that holds its denoiser."""
    return next((n for n in ("unet", "transformer") if isinstance(getattr(pipe, n, None), nn.Module)), None)


def inner_denoiser(pipe: Any) -> nn.Module:
    """``denoiser(pipe)`` without the wrapper of ``torch.compile``; plans name the layers of this module."""
    return uncompiled(denoiser(pipe))


def other_denoisers(pipe: Any) -> tuple[str, ...]:
    """Attribute names of further denoisers: Wan 2.2 has a ``transformer_2`` for the last steps."""
    return tuple(n for n in ("unet_2", "transformer_2") if isinstance(getattr(pipe, n, None), nn.Module))


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline by attribute name."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return {n: m for n in names if isinstance(m := getattr(pipe, n, None), nn.Module)}


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. Raises MixDQError when there are none or one is not text."""
    if isinstance(prompts, str):
        raise MixDQError(f"prompts is the text {prompts!r}, expected a list of texts")
    prompts = list(prompts)
    if not prompts:
        raise MixDQError("prompts is empty, expected at least one text")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise MixDQError(f"prompt {i} is {prompt!r}, expected a non-empty text")
    return prompts


@torch.no_grad()
def generate(
    pipe: Any, prompts: Sequence[str], sampling: Sampling, output: Literal["latent", "pt"] = "pt"
) -> Iterator[Tensor]:
    """Yields batches of pictures ([B, 3, H, W], float in [0, 1]) or final latents ([B, C, h, w]), float32 on the CPU.

    Video pipelines (whose output has ``frames``, such as WanPipeline) give [B, F, 3, H, W], or latents [B, C, f, h, w].

    Raises MixDQError for a pipeline that requires a picture as input.
    """
    prompts = check_prompts(prompts)
    _check_seed(sampling.seed + len(prompts) - 1)
    size = {"num_frames" if name == "frames" else name: value for name, value in sampling.size().items()}
    guidance = _guidance(pipe, sampling)
    for start in range(0, len(prompts), sampling.batch_size):
        batch = prompts[start : start + sampling.batch_size]
        with of_prompts_alone(pipe):
            result = pipe(
                prompt=batch,
                num_inference_steps=sampling.steps,
                generator=[torch.Generator("cpu").manual_seed(sampling.seed + start + i) for i in range(len(batch))],
                output_type=output,
                **guidance,
                **size,
            )
        yield drawn(result).detach().float().cpu()


def _guidance(pipe: Any, sampling: Sampling) -> dict[str, float]:
    """The keyword argument for guidance; none for pipelines that take none (HunyuanImage's guider is part of it)."""
    parameters = inspect.signature(pipe).parameters.values()
    if any(p.name == "guidance_scale" or p.kind is p.VAR_KEYWORD for p in parameters):
        return {"guidance_scale": sampling.guidance_scale}
    if sampling.guidance_scale != 0:
        raise MixDQError(
            f"guidance_scale is {sampling.guidance_scale}, expected 0: {type(pipe).__name__} takes no guidance_scale"
        )
    return {}


@contextmanager
def of_prompts_alone(pipe: Any) -> Iterator[None]:
    """Explains the errors of pipelines that require a picture besides the prompt, such as inpainting or ControlNet."""
    try:
        yield
    except MixDQError:
        raise
    except (TypeError, ValueError, AttributeError) as e:
        wanted = [name for name in PICTURES if name in inspect.signature(type(pipe).__call__).parameters]
        if not wanted:
            raise
        raise MixDQError(
            f"{type(pipe).__name__} takes {' and '.join(wanted)} besides prompts, and drew nothing without ({e}); use "
            f"its text-to-image pipeline, or calibrate(pipe.{_name_of_denoiser(pipe) or 'unet'}, run=lambda: "
            "pipe(prompt, image=...))"
        ) from e


def drawn(result: Any) -> Tensor:
    """The ``images`` of a pipeline's output, or the ``frames`` of a video.

    Raises MixDQError if the output has neither, or if they are not a tensor.
    """
    found = next((getattr(result, name) for name in ("images", "image", "frames") if hasattr(result, name)), None)
    if not isinstance(found, Tensor):
        raise MixDQError(
            f"the pipeline gave {type(result).__name__} with {type(found).__name__}, expected images or frames as a "
            "tensor for output_type 'pt' and 'latent'"
        )
    return found


def each_frame(images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] unchanged; videos [B, F, 3, H, W] as their frames [B F, 3, H, W]."""
    return images.flatten(0, 1) if images.dim() == 5 else images


def generate_all(
    pipe: Any, prompts: Sequence[str], sampling: Sampling, output: Literal["latent", "pt"] = "pt"
) -> Tensor:
    """All pictures or latents of ``prompts`` in one tensor."""
    return torch.cat(list(generate(pipe, prompts, sampling, output)))
