"""Measures a variant: picture quality, bytes held, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..layers import find_products
from ..models.pipelines import Sampling, generate
from ..progress import progress
from ..quantize.tensor import is_quantized
from ..search.metrics import frechet_distance, psnr, ssim


class Scorer(Protocol):
    """Judges whether pictures show what their captions say, and extracts features for a Fréchet distance."""

    def agreement(self, images: Tensor, specs: Sequence[Any]) -> Any: ...

    def features(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Exam:
    """The test that every variant takes: prompts, the specs their pictures must show, and the scorer."""

    prompts: Sequence[str]
    specs: Sequence[Any]
    scorer: Scorer
    sampling: Sampling

    def draw(self, pipe: Any, title: str) -> Tensor:
        """Draws all prompts: pictures [N, 3, H, W] in [0, 1]."""
        images = []
        with progress(title, len(self.prompts)) as bar:
            for batch in generate(pipe, self.prompts, self.sampling):
                images.append(batch)
                bar.advance(len(batch))
        return torch.cat(images)

    def grade(self, images: Tensor, reference: Tensor) -> dict[str, float | None]:
        """Agreement with the captions; SSIM, PSNR and Fréchet distance against ``reference``, the full-precision
        pictures from the same noise. PSNR is None if the pictures are identical."""
        same = torch.equal(images, reference)
        return {
            "agreement": float(self.scorer.agreement(images, self.specs).all),
            "ssim": ssim(images, reference).mean().item(),
            "psnr": None if same else psnr(images, reference).mean().item(),
            "frechet": 0.0 if same else frechet_distance(self._features(images), self._features(reference)),
        }

    def _features(self, images: Tensor) -> Tensor:
        return self.scorer.features(images)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the tensors stored for linear and convolution layers: packed integers, scales, zero points, BOS rows,
    biases; memory shared by several layers counts once."""
    held: dict[int, int] = {}
    for module in find_products(model).values():
        for tensor in _tensors(module):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = max(held.get(storage.data_ptr(), 0), tensor.numel() * tensor.element_size())
    return sum(held.values())


def _tensors(module: nn.Module) -> list[Tensor]:
    tensors: list[Tensor] = []
    for parameter in module.parameters(recurse=False):
        tensors += parameter.stored_tensors().values() if is_quantized(parameter) else [parameter]  # type: ignore[union-attr]
    return tensors


def rounds_of(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2
) -> dict[str, list[float]]:
    """{name: milliseconds in each round}. A round times every call once, so drifts of the machine's speed affect all
    calls alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup + rounds):
        one_round(calls, times)
    return {name: found[warmup:] for name, found in times.items()}


def one_round(calls: Mapping[str, Callable[[], object]], times: Mapping[str, list[float]]) -> None:
    """Runs each call once and appends its milliseconds to ``times``."""
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        times[name].append(1e3 * (time.perf_counter() - start))


def speedup(reference: list[float], times: list[float]) -> float:
    """The median over rounds of ``reference`` time / time."""
    return statistics.median(r / t for r, t in zip(reference, times, strict=True))
