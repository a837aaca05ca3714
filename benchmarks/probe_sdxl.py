"""Sensitivities of SDXL's 794 layers from random probes, against one layer at a time: python -m benchmarks.probe_sdxl

SDXL's layout at a tenth to a thirteenth of its width, random float32 weights, an 8 x 8 latent: what grows with the
number of layers is as in the real model. All layers, weights at 2, 4, 8 bits and activations at 4, 8, by 1, 4 and 16
probes; one at a time (with everything before the layer taken from the first run) every fifth layer, its time scaled
to all.
Seconds of one core, rank correlation over the sampled layers. Writes benchmarks/results/probe_sdxl.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from benchmarks.layouts import SDXL
from benchmarks.sdxl import TOKENS
from mixdq_ao import Calibration, Sampling, Sensitivity, analyze, calibrate
from mixdq_ao.app.environment import environment
from mixdq_ao.jsonfile import write_document
from mixdq_ao.search.analyze import Evaluation
from mixdq_ao.search.probe_stats import rank_correlation
from mixdq_ao.search.sensitivity import Kind
from mixdq_ao.search.trial import Trials

RESULTS = Path(__file__).parent / "results"
NARROW: dict[str, Any] = {"block_out_channels": (32, 64, 96), "attention_head_dim": (2, 4, 6)}
NARROW |= {"cross_attention_dim": 128, "sample_size": 8}
PROMPTS, EVERY, PROBES = 4, 5, (1, 4, 16)
CHOICES: tuple[tuple[Kind, int], ...] = (("weight", 2), ("weight", 4), ("weight", 8), ("act", 4), ("act", 8))


class Pipeline:
    """One call of the UNet on noise; a prompt is the number of its random text rows."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(**{**SDXL, **NARROW}).eval().requires_grad_(False)

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **options: Any) -> SimpleNamespace:
        draw = lambda n, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(n))  # noqa: E731
        size = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(len(prompt), 1)
        pooled = SDXL["projection_class_embeddings_input_dim"] - 6 * SDXL["addition_time_embed_dim"]
        added = {"text_embeds": torch.stack([draw(int(p), pooled) for p in prompt]), "time_ids": size}
        text = torch.stack([draw(int(p), TOKENS, NARROW["cross_attention_dim"]) for p in prompt])
        noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generator])
        output = self.unet(noise, torch.tensor(999), text, added_cond_kwargs=added, return_dict=False)[0]
        return SimpleNamespace(images=output)


def sampled(pipe: Pipeline, prompts: list[str], calibration: Calibration) -> tuple[dict[Evaluation, float], float]:
    """Error powers of every fifth layer alone, and the seconds that all layers would take."""
    start = time.process_time()
    trials = TrialsWithoutPictures(pipe, prompts)
    ready = time.process_time() - start
    names = trials.called()
    start, errors = time.process_time(), {}
    for name in names[::EVERY]:
        for kind, bits in CHOICES:
            e = Evaluation(name, kind, bits)
            errors[e] = trials.measure(name, e.layer(calibration), None, images=False)["error"]
    return errors, ready + (time.process_time() - start) * len(names) / len(names[::EVERY])


class TrialsWithoutPictures(Trials):
    """The pipeline has no decoder: what it calls pictures are its outputs."""

    def __init__(self, pipe: Any, prompts: list[str]) -> None:
        with torch.no_grad():
            super().__init__(pipe, prompts, Sampling(batch_size=PROMPTS))


def ranks(errors: dict[Evaluation, float], found: Sensitivity) -> dict[str, float]:
    result = {}
    for kind, bits in CHOICES:
        mine = [e for e in errors if (e.kind, e.bits) == (kind, bits)]
        pair = [errors[e] for e in mine], [found.layers[e.name].errors(kind)[bits] for e in mine]
        result[f"{kind[0].upper()}{bits}"] = rank_correlation(np.array(pair[0]), np.array(pair[1]))
    return result


def measure() -> dict[str, Any]:
    pipe, prompts = Pipeline(), [str(i) for i in range(PROMPTS)]
    calibration = calibrate(pipe, prompts)
    with torch.no_grad():
        errors, seconds = sampled(pipe, prompts, calibration)
    figures: dict[str, Any] = {"layers": len(calibration.layers), "sampled": len(errors) // len(CHOICES)}
    figures["seconds, one at a time"] = seconds
    for probes in PROBES:
        options: dict[str, Any] = {"calibration": calibration, "probes": probes, "batch_size": PROMPTS}
        start = time.process_time()
        found = analyze(pipe, prompts, method="probe", rule=lambda name: "quality", **options)
        took = time.process_time() - start
        figures[f"{probes} probes"] = {"seconds": took, "times_faster": seconds / took, "rank": ranks(errors, found)}
        print(probes, figures[f"{probes} probes"], flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for probe_sdxl.json")
    args = parser.parse_args()
    document = {"command": "python -m benchmarks.probe_sdxl", **measure(), "environment": environment()}
    write_document(args.out / "probe_sdxl.json", document)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
