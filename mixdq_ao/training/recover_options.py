"""The recipe of ``recover``: its options, their checks, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from ..errors import OptimizerError
from ..expect import expect, is_number, whole
from ..models.pipelines import SIZES
from .moments import KINDS

Train = Literal["weights", "low_rank"]
RATE_OF_BITS = {2: 1.0, 4: 0.25, 8: 0.05, 16: 0.05}
"""Learning rates of weights by their bits, as fractions of ``lr``: a weight has to move by a grid step before its code
changes, and coarser grids have larger steps. Set by hand; no benchmark varies them."""
FINAL_RATE = 0.02
"""Learning rate at the last step, as a fraction of the highest. Set by hand; no benchmark varies it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that determines the result, besides pipeline, plan and prompts.

    Attributes:
        steps: number of optimizer steps.
        block_steps: the first of these steps train each block by itself, on its teacher's input and output.
        batch_size: samples per step; a sample is one call of the denoiser for one prompt.
        trajectory: numbers of denoising steps of the trajectories that are learned from, in equal shares of every
            batch.
        lr: highest learning rate, relative to the root mean square of each parameter tensor; for quantized weights
            multiplied by ``RATE_OF_BITS``.
        others: learning rate of all other parameters, as a fraction of ``lr``.
        warmup: fraction of the steps in which the rate rises; then it falls along half a cosine to ``FINAL_RATE``.
        average: decay per step of the averaged parameters, which are the ones kept; 0 keeps the last parameters.
        train: "weights": all parameters; "low_rank": only a product of two thin matrices that is added to each
            quantized weight before rounding (arXiv 2406.06385), and what ``learn_scales`` and ``learn_ranges`` say.
        rank: rank of these products.
        learn_scales: train the scales of the weights (arXiv 1902.08153); else they keep the plan's values.
        learn_ranges: train the ranges of the inputs (arXiv 2004.09576); else they stay as calibrated.
        block_weight: weight of the mean relative error of the blocks, added to the loss on the output (after
            ``block_steps``).
        refresh: steps after which trajectories are recorded again, from other noise; 0: never.
        evaluate_every: steps between measurements on held-out prompts.
        diverged: stop if an error exceeds its minimum so far by this factor.
        clip: largest norm of the gradient of the loss, a relative error power.
        adam_moments: storage of AdamW's moments, see MemoryEfficientAdamW.
        guidance_scale, seed, height, width, frames: of the trajectories; see Sampling.
    """

    steps: int
    block_steps: int = 0
    batch_size: int = 16
    trajectory: tuple[int, ...] = (1, 4)
    lr: float = 1e-2
    others: float = 0.2
    warmup: float = 0.05
    average: float = 0.99
    train: Train = "weights"
    rank: int = 16
    learn_scales: bool = True
    learn_ranges: bool = False
    block_weight: float = 0.0
    refresh: int = 0
    evaluate_every: int = 100
    diverged: float = 8.0
    clip: float = 1.0
    adam_moments: str = "float32"
    guidance_scale: float = 0.0
    seed: int = 0
    height: int | None = None
    width: int | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rank", "evaluate_every"):
            self._whole(name, getattr(self, name), 1)
        for name in ("block_steps", "refresh", "seed"):
            self._whole(name, getattr(self, name), 0)
        for name, value in self.size().items():
            self._whole(name, 1 if value is None else value, 1)
        self._expect("block_steps", self.block_steps <= self.steps, f"at most the {self.steps} steps")
        several = isinstance(self.trajectory, tuple) and len(self.trajectory) > 0
        self._expect("trajectory", several, "a tuple of numbers of denoising steps")
        for count in self.trajectory:
            self._whole("trajectory", count, 1)
        shares = len(self.trajectory)
        self._expect("batch_size", self.batch_size >= shares, f"at least {shares}, one of each trajectory")
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            self._expect(name, is_number(value) and low <= value <= high, f"a number from {low:g} to {high:g}")
        for name, offered in (("train", get_args(Train)), ("adam_moments", KINDS)):
            self._expect(name, getattr(self, name) in offered, f"one of {', '.join(offered)}")

    def _expect(self, name: str, good: bool, expected: str) -> None:
        expect(good, name, getattr(self, name), expected, OptimizerError)

    @staticmethod
    def _whole(name: str, value: object, least: int) -> None:
        whole(value, name, least=least, error=OptimizerError)

    def rate(self, step: int) -> float:
        """The learning rate of ``step`` as a fraction of ``lr``."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))

    def to_json(self) -> dict[str, Any]:
        """All fields; sizes only if they are given."""
        fields = {name: value for name, value in asdict(self).items() if name not in SIZES or value is not None}
        return {**fields, "trajectory": list(self.trajectory)}

    def size(self) -> dict[str, int | None]:
        return {name: getattr(self, name) for name in SIZES}


_BOUNDS = (
    ("lr", 1e-8, 1.0),
    ("others", 0.0, 10.0),
    ("warmup", 0.0, 1.0),
    ("average", 0.0, 0.99999),
    ("block_weight", 0.0, 1e6),
    ("diverged", 1.0, 1e9),
    ("clip", 1e-6, 1e9),
    ("guidance_scale", 0.0, 1e6),
)


class RecipeOptions(TypedDict, total=False):
    """Keyword arguments of ``recover``: the fields of ``Recipe`` besides ``steps``."""

    block_steps: int
    batch_size: int
    trajectory: int | Sequence[int]
    lr: float
    others: float
    warmup: float
    average: float
    train: Train
    rank: int
    learn_scales: bool
    learn_ranges: bool
    block_weight: float
    refresh: int
    evaluate_every: int
    diverged: float
    clip: float
    adam_moments: str
    guidance_scale: float
    seed: int
    height: int | None
    width: int | None
    frames: int | None


def recipe_of(steps: int, options: Mapping[str, Any]) -> Recipe:
    """A recipe from keyword arguments. Raises OptimizerError naming an argument that is unknown or out of range."""
    known = {f.name for f in fields(Recipe)}
    if unknown := sorted(set(options) - known):
        raise OptimizerError(f"recover has no option {unknown[0]!r}; expected {', '.join(sorted(known - {'steps'}))}")
    if isinstance(options.get("trajectory"), list | int):
        given = options["trajectory"]
        options = {**options, "trajectory": (given,) if isinstance(given, int) else tuple(given)}
    return Recipe(steps=steps, **options)
