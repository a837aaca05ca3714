"""Trains the two CLIP text encoders: a reader must find every attribute of the picture in their states.

BOS carries an outlier from the start, as large as the real model's (see README): in each encoder one channel
of its token embedding holds a constant, which the residual stream takes to the last layer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from examples.shapes.data import GROUNDS, PLACES, caption, draw_spec
from examples.shapes.labels import CLASSES, GROUND_CLASSES, hits, labels, reading_loss
from examples.shapes.models import WIDTHS, make_text_encoders
from examples.shapes.training import Recipe, fit, generators

RECIPE = Recipe(steps=800, batch=64, lr=1.5e-3, average=0.99, seed=2)
BOS_OUTLIER = 820.0  # SDXL: 823.5
OUTLIER = ((7, 1.0), (21, -1.0))  # per encoder: the channel of BOS's outlier and its sign
OUTLIER_COLUMNS = (OUTLIER[0][0], WIDTHS[0] + OUTLIER[1][0])  # the same channels in the UNet's input


class Reader(nn.Module):
    """Five place queries and a ground query attend to the prompt rows, as the UNet will; BOS is left out."""

    def __init__(self, width: int, pooled: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(1, len(PLACES) + 1, 128) * 0.5)
        self.keys, self.values = nn.Linear(width, 128), nn.Linear(width, 128)
        self.places = nn.ModuleDict({name: nn.Linear(128, n) for name, n in CLASSES.items()})
        self.ground = nn.Linear(128, GROUND_CLASSES)
        self.pooled_places = nn.ModuleDict({name: nn.Linear(pooled, len(PLACES) * n) for name, n in CLASSES.items()})
        self.pooled_ground = nn.Linear(pooled, len(GROUNDS))

    def forward(self, states: Tensor, pooled: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logits read from the states [B, L, width], and from the pooled embedding [B, pooled]."""
        rows = states[:, 1:]
        q, k, v = map(self._split, self._attend(rows))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        from_rows = {name: head(found[:, :-1]) for name, head in self.places.items()}
        from_pooled = {n: h(pooled).unflatten(1, (len(PLACES), -1)) for n, h in self.pooled_places.items()}
        return from_rows | {"ground": self.ground(found[:, -1])}, from_pooled | {"ground": self.pooled_ground(pooled)}

    def _attend(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.queries.expand(len(rows), -1, -1), self.keys(rows), self.values(rows)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TextEncoders(nn.Module):
    """Both encoders as StableDiffusionXLPipeline reads them: penultimate states, pooled of the second."""

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] to states [B, L, 224] and pooled embeddings [B, 128]."""
        first = self.first(ids, output_hidden_states=True)
        second = self.second(ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds

    def tables(self) -> list[Tensor]:
        """The two token embeddings, [vocabulary, width] each."""
        return [cast(nn.Embedding, encoder.get_input_embeddings()).weight for encoder in (self.first, self.second)]

    @torch.no_grad()
    def set_outlier(self, bos: int) -> None:
        """Writes BOS's outlier into the token embeddings."""
        for table, (channel, sign) in zip(self.tables(), OUTLIER, strict=True):
            table[bos, channel] = sign * BOS_OUTLIER


def tokens(tokenizer: CLIPTokenizer, captions: list[str], *, full: bool = True) -> Tensor:
    """Token ids, padded with EOS to [B, 77], or to the longest caption unless `full`."""
    padding = "max_length" if full else "longest"
    return tokenizer(captions, padding=padding, max_length=77, truncation=True, return_tensors="pt").input_ids


def train_text(
    tokenizer: CLIPTokenizer,
    checkpoint: Path,
    report: Callable[[int, int, str], None],
    recipe: Recipe = RECIPE,
) -> tuple[TextEncoders, dict]:
    """Returns both trained encoders and measurements on held-out captions."""
    torch.manual_seed(recipe.seed)
    encoders = TextEncoders(*make_text_encoders(tokenizer))
    bos = cast(int, tokenizer.bos_token_id)
    encoders.set_outlier(bos)
    for table in encoders.tables():
        table.register_hook(lambda g: g.index_fill(0, torch.tensor([bos]), 0))  # BOS's row stays as it is set
    both = nn.ModuleDict({"encoders": encoders, "reader": Reader(sum(WIDTHS), WIDTHS[1])})
    held_out = _batch(tokenizer, recipe, -1, held_out=True)

    def loss(step: int) -> Tensor:
        ids, wanted = _batch(tokenizer, recipe, step)
        states, pooled = encoders(ids)
        from_rows, from_pooled = both["reader"](states, pooled)
        small = 1e-3 * states[:, 1:].square().mean()
        return reading_loss(from_rows, wanted) + reading_loss(from_pooled, wanted) + small

    run = fit(both, loss, recipe, checkpoint=checkpoint, report=report)
    return encoders, measure(both, *held_out) | {"seconds": run.seconds}


def _batch(
    tokenizer: CLIPTokenizer, recipe: Recipe, step: int, *, held_out: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    rng, _ = generators(recipe, step)
    specs = [draw_spec(rng, held_out=held_out) for _ in range(256 if held_out else recipe.batch)]
    ids = tokens(tokenizer, [caption(spec, rng) for spec in specs], full=held_out or step % 4 == 0)
    return ids, labels(specs)


@torch.no_grad()
def measure(both: nn.ModuleDict, ids: Tensor, wanted: dict[str, Tensor]) -> dict:
    """Measures the fractions of captions read without a mistake, and the magnitudes of BOS and the other rows."""
    states, pooled = both["encoders"](ids)
    from_rows, from_pooled = both["reader"](states, pooled)
    return {
        "read_from_rows": hits(from_rows, wanted)[0].float().mean().item(),
        "read_from_pooled": hits(from_pooled, wanted)[0].float().mean().item(),
        "bos_max": states[:, 0].abs().max().item(),
        "other_max": states[:, 1:].abs().max().item(),
    }
