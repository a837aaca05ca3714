"""AutoRound's mixed-bit search (AutoScheme) on the pipeline."""

from __future__ import annotations

from torch import nn

from .subject import Subject

OPTIONS = ("W2A16", "W4A16", "W8A16")


def auto_round(unet: nn.Module, subject: Subject) -> nn.Module:
    """4 bits on average from 2, 4 and 8, no tuning of the rounding (iters=0), the captions as its data.

    Release 0.16.1 quantizes pipelines, but its search asks for a tokenizer and a language model's loss, and refuses.
    """
    from auto_round import AutoRound, AutoScheme

    pipe = subject.with_unet(unet)
    rounding = AutoRound(
        pipe,
        scheme=AutoScheme(avg_bits=4, options=OPTIONS),
        iters=0,
        num_inference_steps=1,
        guidance_scale=0.0,
        dataset=subject.calibrating,
        device_map="cpu",
    )
    found, _ = rounding.quantize()
    return found
