"""The scorer: a small network that reads from a picture everything its caption says.

It is trained on drawn pictures only (blurred, noisy, tinted), never on what the pipeline makes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shapes.data import PLACES, Spec, draw_spec, picture
from examples.shapes.labels import CLASSES, GROUND_CLASSES, hits, labels, reading_loss
from examples.shapes.training import Recipe, fit, generators

RECIPE = Recipe(steps=700, batch=64, lr=2e-3, average=0.99, seed=3)
FEATURES = 192


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well pictures and captions agree.

    `all`: fraction of pictures with every reading right. `per`: fraction of right readings by kind (shape,
    colour, size, ground). `correct`: bool [B], the pictures with every reading right.
    """

    all: float
    per: dict[str, float]
    correct: Tensor


class Scorer(nn.Module):
    """Reads the ground, and at each of five places a shape (or nothing), its colour and its size."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.ReLU(),
            *_halve(width, width), *_halve(width, 2 * width), nn.Flatten(),
            nn.Linear(2 * width * 8 * 8, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.places = nn.ModuleDict({name: nn.Linear(FEATURES, len(PLACES) * n) for name, n in CLASSES.items()})
        self.ground = nn.Linear(FEATURES, GROUND_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features [B, 192] of images [B, 3, 64, 64] in [0, 1]."""
        return self.body(images.float() * 2 - 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits: per place [B, 5, classes] by kind, and the ground's [B, 6]."""
        x = self.features(images)
        places = {name: head(x).unflatten(1, (len(PLACES), -1)) for name, head in self.places.items()}
        return places | {"ground": self.ground(x)}

    @torch.no_grad()
    def agreement(self, images: Tensor, specs: list[Spec]) -> Agreement:
        """Compares images [B, 3, 64, 64] in [0, 1] with the specs they should show."""
        if images.shape[1:] != (3, 64, 64) or len(images) != len(specs):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected ({len(specs)}, 3, 64, 64), one per spec"
            )
        right, per = hits(self(images.cpu()), labels(specs))
        return Agreement(right.float().mean().item(), per, right)


def _halve(i: int, o: int) -> list[nn.Module]:
    """Halves height and width."""
    first = [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
    return [*first, nn.Conv2d(o, o, 3, 1, 1), nn.BatchNorm2d(o), nn.ReLU()]


def train_scorer(
    checkpoint: Path, report: Callable[[int, int, str], None], recipe: Recipe = RECIPE
) -> tuple[Scorer, dict]:
    """Returns the trained scorer and its accuracy on held-out pictures, clean and disturbed."""
    torch.manual_seed(recipe.seed)
    scorer = Scorer()

    def loss(step: int) -> Tensor:
        rng, noise = generators(recipe, step)
        specs = [draw_spec(rng) for _ in range(recipe.batch)]
        x = torch.stack([picture(spec, rng, jitter=1.0) for spec in specs])
        return reading_loss(scorer(disturb(x, noise)), labels(specs))

    run = fit(scorer, loss, recipe, checkpoint=checkpoint, report=report)
    rng, noise = generators(recipe, -1)
    specs = [draw_spec(rng, held_out=True) for _ in range(512)]
    x = torch.stack([picture(spec, rng) for spec in specs])
    drawn, disturbed = scorer.agreement(x, specs).all, scorer.agreement(disturb(x, noise), specs).all
    return scorer, {"drawn": drawn, "disturbed": disturbed, "seconds": run.seconds}


def disturb(x: Tensor, noise: torch.Generator) -> Tensor:
    """Disturbs images: a quarter as is, a quarter blurred, a quarter noisy, a quarter both; all tinted a little."""
    x, rows = x.clone(), len(x) // 4
    x[rows : 3 * rows] = _blur(x[rows : 3 * rows])
    strength = 0.08 * torch.rand(2 * rows, 1, 1, 1, generator=noise)
    grains = torch.randn(2 * rows, *x.shape[1:], generator=noise)
    grains[::2] = _blur(grains[::2]) * 2  # grains of one pixel and of two
    x[2 * rows : 4 * rows] += strength * grains
    return x + 0.02 * torch.randn(len(x), 3, 1, 1, generator=noise)


def _blur(x: Tensor) -> Tensor:
    return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
