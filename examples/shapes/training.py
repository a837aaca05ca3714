"""The loop that trains every part: AdamW, warm-up and cosine decay, averaged weights, exact resuming.

Batches and noise must be functions of the step alone (see `generators`): then a run that was killed and
continued gives the same weights as one that was not.
"""

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How long and how fast one part is trained; `average` is the decay per step of the averaged weights."""

    steps: int
    batch: int
    lr: float
    average: float
    seed: int
    warmup: int = 100
    save_every: int = 100

    def rate(self, step: int) -> float:
        """The learning rate of `step`: linear warm-up, then half a cosine down to 2 % of `lr`."""
        decay = 0.51 + 0.49 * math.cos(math.pi * min(1.0, step / self.steps))
        return self.lr * min(1.0, (step + 1) / self.warmup) * decay


def channels_last(module: Module) -> Module:
    """`module` with its convolutions' weights, and so their outputs, in channels-last order."""
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # not in torch's hints


def generators(recipe: Recipe, step: int) -> tuple[random.Random, torch.Generator]:
    """The random numbers of one step."""
    number = recipe.seed * 1_000_003 + step
    return random.Random(number), torch.Generator().manual_seed(number)


class Run:
    """The state that must survive a kill: weights, their average, the optimizer's state, step and seconds spent."""

    def __init__(self, module: nn.Module, recipe: Recipe, checkpoint: Path) -> None:
        self.module, self.recipe, self.checkpoint = module, recipe, checkpoint
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.average = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        if checkpoint.exists():
            self._load()

    def update(self, loss: Tensor) -> None:
        """One step of the optimizer and of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        for key, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1 - decay)
            else:
                self.average[key].copy_(value)

    def save(self) -> None:
        """Writes the checkpoint atomically: a kill leaves the old one or the new one."""
        state = {name: getattr(self, name) for name in ("step", "seconds", "average")}
        state |= {"recipe": asdict(self.recipe), "module": self.module.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict()}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        old, new = state["recipe"], asdict(self.recipe)
        if old | {"steps": new["steps"]} != new:  # more steps may be asked for
            raise ValueError(
                f"{self.checkpoint} was written with {old}, but the recipe is now {new}; "
                "remove the file to train this part anew"
            )
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.average = state["step"], state["seconds"], state["average"]


def fit(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    recipe: Recipe,
    *,
    checkpoint: Path,
    report: Callable[[int, int, str], None] = lambda step, steps, text: None,
) -> Run:
    """Trains `module` on ``loss(step)`` up to the last step, from `checkpoint` if there is one.

    At the end the module holds the averaged weights and is in evaluation mode.
    """
    run = Run(module, recipe, checkpoint)
    module.train()
    while run.step < recipe.steps:
        start = time.monotonic()
        value = loss(run.step)
        run.update(value)
        run.seconds += time.monotonic() - start
        if run.step % recipe.save_every == 0 or run.step == recipe.steps:
            run.save()
        report(run.step, recipe.steps, f"loss {value.item():.4f}")
    module.load_state_dict(run.average)
    module.eval()
    return run
