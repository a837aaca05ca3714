"""How a quantized model is trained back: one frozen recipe, its checks, its learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..errors import OptimizerError
from ..models.pipelines import SIZES
from .moments import KINDS

Train = Literal["weights", "low_rank"]
RATE_OF_BITS = {2: 1.0, 4: 0.25, 8: 0.05, 16: 0.05}
"""Learning rates of weights by their bits, as parts of ``lr``: coarse codes must move by whole steps, fine ones not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides the result, besides pipeline, plan and prompts.

    Attributes:
        steps: optimizer steps.
        block_steps: the first of them, in which each block learns its own teacher's output from its teacher's input.
        batch_size: samples (one call of the denoiser for one prompt) a step.
        trajectory: numbers of denoising steps whose calls are learned from, in equal shares of every batch.
        lr: learning rate at its highest, relative to the root mean square of each parameter tensor; of quantized
            weights times ``RATE_OF_BITS``.
        others: learning rate of everything that is not a quantized weight, as a part of ``lr``.
        warmup: share of the steps in which the rate rises; then half a cosine down to 2 %.
        average: decay per step of the averaged parameters, which are what is kept; 0 keeps the last ones.
        train: "weights": everything; "low_rank": a product of two thin matrices, added to each quantized weight
            before it is rounded (arXiv 2406.06385), and nothing else but what ``learn_*`` say.
        rank: of those products.
        learn_scales: train the weights' scales (arXiv 1902.08153); else they stay as the plan makes them.
        learn_ranges: train the ranges of the inputs (arXiv 2004.09576); else they stay as calibrated.
        block_weight: weight of the blocks' relative errors beside the output's, end to end.
        refresh: steps after which trajectories are recorded anew, from other noise; 0: never.
        evaluate_every: steps between measurements on held-out prompts.
        diverged: stop when an error is this many times the least seen.
        clip: largest norm of the gradient (of the relative error power).
        adam_moments: how AdamW's moments are stored, see MemoryEfficientAdamW.
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
            _whole(name, getattr(self, name), 1)
        for name in ("block_steps", "refresh", "seed"):
            _whole(name, getattr(self, name), 0)
        for name, value in self.size().items():
            _whole(name, 1 if value is None else value, 1)
        _expect(self.block_steps <= self.steps, "block_steps", self.block_steps, f"at most the {self.steps} steps")
        _expect(
            isinstance(self.trajectory, tuple) and len(self.trajectory) > 0,
            "trajectory",
            self.trajectory,
            "a tuple of numbers of denoising steps",
        )
        for count in self.trajectory:
            _whole("trajectory", count, 1)
        shares = len(self.trajectory)
        _expect(self.batch_size >= shares, "batch_size", self.batch_size, f"at least {shares}, one of each trajectory")
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            _expect(_is_number(value) and low <= value <= high, name, value, f"a number from {low:g} to {high:g}")
        for name, offered in (("train", get_args(Train)), ("adam_moments", KINDS)):
            value = getattr(self, name)
            _expect(value in offered, name, value, f"one of {', '.join(offered)}")

    def rate(self, step: int) -> float:
        """The learning rate of ``step`` as a part of ``lr``."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    def to_json(self) -> dict[str, Any]:
        """Sizes only where they are given."""
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


def recipe_of(steps: int, options: dict[str, Any]) -> Recipe:
    """A recipe from keyword arguments. Raises OptimizerError naming an unknown one or one out of range."""
    known = {f.name for f in fields(Recipe)}
    if unknown := sorted(set(options) - known):
        raise OptimizerError(f"recover has no option {unknown[0]!r}; expected {', '.join(sorted(known - {'steps'}))}")
    if isinstance(options.get("trajectory"), list | int):
        given = options["trajectory"]
        options = {**options, "trajectory": (given,) if isinstance(given, int) else tuple(given)}
    return Recipe(steps=steps, **options)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(name: str, value: object, low: int) -> None:
    _expect(type(value) is int and value >= low, name, value, f"a whole number of at least {low}")


def _expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise OptimizerError(f"{name} is {value!r}, expected {expected}")
