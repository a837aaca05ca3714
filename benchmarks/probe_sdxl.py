"""Sensitivities of SDXL's 794 layers from random probes, against one layer at a time: python -m benchmarks.probe_sdxl

SDXL's layout at a tenth to a thirteenth of its width, random float32 weights, an 8 x 8 latent: what grows with the
number of layers is as in the real model. All layers, weights at 2, 4, 8 bits and activations at 4, 8, by 1 to 16
probes; one at a time every seventh layer, its time scaled to all: with everything before the layer taken from the first
run, as ``analyze`` does, and, as published searches do, with a whole forward for each evaluation (the time of one
forward, times their number; not run). Seconds of one core, rank correlation over the sampled layers, with the probes'
means as they are and as ``analyze`` gives them (drawn to what layers and bit widths have in common). Every figure is
kept in a store (--store); a stopped run continues. Writes benchmarks/results/probe_sdxl.json and probe_sdxl.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
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
from mixdq_ao.search import probe_shrink
from mixdq_ao.search.evaluation import Evaluation
from mixdq_ao.search.fingerprint import fingerprint
from mixdq_ao.search.probe_stats import rank_correlation
from mixdq_ao.search.sensitivity import Kind
from mixdq_ao.search.store import Store
from mixdq_ao.search.trial import Trials

RESULTS = Path(__file__).parent / "results"
NARROW: dict[str, Any] = {"block_out_channels": (32, 64, 96), "attention_head_dim": (2, 4, 6)}
NARROW |= {"cross_attention_dim": 128, "sample_size": 8}
PROMPTS, EVERY, PROBES = 4, 7, (1, 2, 4, 8, 16)
CHOICES: tuple[tuple[Kind, int], ...] = (("weight", 2), ("weight", 4), ("weight", 8), ("act", 4), ("act", 8))


class Pipeline:
    """One call of the UNet on noise; a prompt is the number of its random text rows."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(**{**SDXL, **NARROW}).eval().requires_grad_(False)

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **options: Any) -> SimpleNamespace:

        def draw(n, *shape):
            return torch.randn(*shape, generator=torch.Generator().manual_seed(n))

        size = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(len(prompt), 1)
        pooled = SDXL["projection_class_embeddings_input_dim"] - 6 * SDXL["addition_time_embed_dim"]
        added = {"text_embeds": torch.stack([draw(int(p), pooled) for p in prompt]), "time_ids": size}
        text = torch.stack([draw(int(p), TOKENS, NARROW["cross_attention_dim"]) for p in prompt])
        noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generator])
        output = self.unet(noise, torch.tensor(999), text, added_cond_kwargs=added, return_dict=False)[0]
        return SimpleNamespace(images=output)


def sampled(pipe: Pipeline, prompts: list[str], calibration: Calibration) -> tuple[dict[Evaluation, float], float]:
    """Error powers of every seventh layer alone, and the seconds that all layers would take."""
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
        result[label((kind, bits))] = rank_correlation(np.array(pair[0]), np.array(pair[1]))
    return result


def forward_seconds(pipe: Pipeline, prompts: list[str], rounds: int = 5) -> float:
    """The median of whole forwards, without hooks."""
    taken = []
    for _ in range(rounds):
        generator = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        start = time.process_time()
        with torch.no_grad():
            pipe(prompts, generator)
        taken.append(time.process_time() - start)
    return float(np.median(taken))


@contextmanager
def plain_means() -> Iterator[None]:
    """Inside, layers are never enough for estimates to be drawn together."""
    fewest, probe_shrink.FEWEST = probe_shrink.FEWEST, 1 << 30
    try:
        yield
    finally:
        probe_shrink.FEWEST = fewest


def probed(
    pipe: Pipeline, prompts: list[str], calibration: Calibration, probes: int, errors: dict[Evaluation, float]
) -> dict[str, float]:
    """Seconds, and rank correlations as they are and of plain means."""
    options: dict[str, Any] = {"calibration": calibration, "probes": probes, "batch_size": PROMPTS}
    options |= {"method": "probe", "rule": lambda name: "quality"}
    with tempfile.TemporaryDirectory() as folder:
        options["store"] = Path(folder) / "store"
        start = time.process_time()
        found = analyze(pipe, prompts, **options)
        took = time.process_time() - start
        with plain_means():
            plain = analyze(pipe, prompts, **options)  # of the same probes
    both = zip(RANKS, (ranks(errors, found), ranks(errors, plain)), strict=True)
    return {"seconds": took, **{f"{way}, {c}": r for way, of in both for c, r in of.items()}}


def one_at_a_time(
    store: Store, pipe: Pipeline, prompts: list[str], calibration: Calibration
) -> tuple[dict[Evaluation, float], float]:
    """What ``sampled`` gives, from the store where it is there already."""
    if store.get("one at a time") is None:
        errors, seconds = sampled(pipe, prompts, calibration)
        for e, error in errors.items():
            store.put(e.key, {"error": error})
        store.put("one at a time", {"seconds": seconds})
    every = {Evaluation(n, kind, bits) for n in calibration.layers for kind, bits in CHOICES}
    found = {e: store.results[e.key]["error"] for e in every if e.key in store.results}
    return found, store.results["one at a time"]["seconds"]


def measure(path: Path | None) -> dict[str, Any]:
    pipe, prompts = Pipeline(), [str(i) for i in range(PROMPTS)]
    calibration = calibrate(pipe, prompts)
    with Store(path, fingerprint(pipe.unet, {"prompts": PROMPTS, "every": EVERY})) as store, torch.no_grad():
        errors, seconds = one_at_a_time(store, pipe, prompts, calibration)
        evaluations = len(calibration.layers) * len(CHOICES)
        figures: dict[str, Any] = {"layers": len(calibration.layers), "sampled": len(errors) // len(CHOICES)}
        figures |= {"evaluations": evaluations, "seconds, one at a time": seconds}
        if store.get("forward") is None:
            store.put("forward", {"seconds": forward_seconds(pipe, prompts)})
        figures["seconds, one forward"] = store.results["forward"]["seconds"]
        whole = figures["seconds, one at a time without reuse"] = figures["seconds, one forward"] * evaluations
        for probes in PROBES:
            key = f"{probes} probes"
            if store.get(key) is None:
                store.put(key, probed(pipe, prompts, calibration, probes, errors))
            found = store.results[key]
            faster = {
                "times_faster": seconds / found["seconds"],
                "times_faster, without reuse": whole / found["seconds"],
            }
            figures[key] = {"seconds": found["seconds"], **faster}
            for way in RANKS:
                figures[key][way] = {c: found[f"{way}, {c}"] for c in map(label, CHOICES)}
            print(key, figures[key], flush=True)
    return figures


RANKS = ("rank", "rank, plain means")


def label(choice: tuple[Kind, int]) -> str:
    return f"{choice[0][0].upper()}{choice[1]}"


def table(document: dict[str, Any]) -> str:
    """The figures for people."""
    head = "| probes | seconds | times faster | ... than without reuse | rank correlation | ... of plain means |"
    rows = [head, "|---|---|---|---|---|---|"]
    for probes in PROBES:
        found = document[f"{probes} probes"]
        spans = [f"{min(found[r].values()):.3f} to {max(found[r].values()):.3f}" for r in RANKS]
        faster = (found["times_faster"], found["times_faster, without reuse"])
        rows.append(f"| {probes} | {found['seconds']:.1f} | {faster[0]:.0f} | {faster[1]:.0f} | {' | '.join(spans)} |")
    named = {k.replace(" ", "_").replace(",", ""): v for k, v in document.items()}
    texts = [fill(text.format(**named), 120) for text in TEXTS]
    return "\n\n".join(["# Random probes on SDXL's 794 layers", *texts[:-1], "\n".join(rows), texts[-1]]) + "\n"


TEXTS = (
    "`{command}`: SDXL's layout at a tenth of its width, random weights; W2, W4, W8, A4 and A8 of every layer. Rank "
    "correlation with one layer at a time, the lowest and highest of the five widths, over {sampled} layers. Seconds "
    "of one core of a busy machine.",
    "One at a time takes {seconds_one_at_a_time:.0f} s for the {evaluations} evaluations with everything before the "
    "changed layer taken from the first run, as `analyze` does. With a whole forward of {seconds_one_forward:.3f} s "
    "for each, as published searches do it, it would take {seconds_one_at_a_time_without_reuse:.0f} s (a product of "
    "the two, not run).",
    "The last column is of the same probes without drawing estimates to what layers and bit widths have in common "
    "(`mixdq_ao/search/probe_shrink.py`). The first row pays for what is only done once in a process.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, help="a file that figures are kept in")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for probe_sdxl.json")
    args = parser.parse_args()
    document = {"command": "python -m benchmarks.probe_sdxl", **measure(args.store), "environment": environment()}
    write_document(args.out / "probe_sdxl.json", document)
    (args.out / "probe_sdxl.md").write_text(table(document), encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
