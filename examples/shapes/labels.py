"""The contents of a caption as class labels: the ground, and a shape, colour and size per place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.shapes.data import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, Spec

NOTHING = len(SHAPES)  # the shape read at an empty place
CLASSES = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(SIZES)}  # per place
GROUND_CLASSES = len(GROUNDS)
IGNORE = -100


def labels(specs: list[Spec]) -> dict[str, Tensor]:
    """``ground`` [B]; ``shape``, ``colour`` and ``size`` [B, 5], the last two `IGNORE` at empty places."""
    rows = [_places(spec) for spec in specs]
    out = {name: torch.tensor([[place[i] for place in row] for row in rows]) for i, name in enumerate(CLASSES)}
    return out | {"ground": torch.tensor([list(GROUNDS).index(spec.ground) for spec in specs])}


def _places(spec: Spec) -> list[tuple[int, int, int]]:
    found = {s.place: s for s in spec.shapes}
    return [
        (SHAPES.index(s.shape), list(COLOURS).index(s.colour), SIZES.index(s.size)) if s else (NOTHING, IGNORE, IGNORE)
        for s in map(found.get, PLACES)
    ]


def reading_loss(logits: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Summed cross entropies; logits are [B, 5, classes] per place and [B, classes] for the ground."""
    losses = [
        F.cross_entropy(logits[name].flatten(0, -2), y.flatten(), ignore_index=IGNORE) for name, y in wanted.items()
    ]
    return torch.stack(losses).sum()


def hits(logits: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Which rows have no wrong reading (bool [B]), and the fraction of right readings of each kind."""
    right, per = torch.ones(len(wanted["ground"]), dtype=torch.bool), {}
    for name, y in wanted.items():
        hit = logits[name].argmax(-1) == y
        per[name] = hit[y != IGNORE].float().mean().item()
        right &= (hit | (y == IGNORE)).flatten(1).all(1) if y.ndim == 2 else hit
    return right, per
