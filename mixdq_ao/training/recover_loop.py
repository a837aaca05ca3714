"""The training loop of ``recover``: steps, averages, measurements on held-out prompts, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..models.outputs import denoised
from ..models.pipelines import inner_denoiser
from ..progress import progress
from ..search.fingerprint import fingerprint
from .averaging import Average
from .base import MemoryEfficientOptimizer
from .optim import MemoryEfficientAdamW
from .recover_blocks import alone, find_blocks, recorded_calls, together
from .recover_layers import NEAR, Student, students
from .recover_options import RATE_OF_BITS, Recipe
from .recover_state import Progress, load_optimizer, load_run, optimizer_tensors, save_run
from .recover_targets import Targets, record

SMALLEST_SIZE = 1e-2
"""Smallest root mean square that is assumed of a parameter tensor, so that biases of zero can change."""
LOSS_WEIGHT = 0.05
"""Weight of a step in the running mean of the loss, which is shown and checked for divergence: a mean over 20 steps."""
BETAS = (0.9, 0.99)
"""AdamW's decays. Runs take some hundred steps (200 to 700 in benchmarks/results/recover.md), too few for the usual
second decay of 0.999, which averages over 1000 steps. No benchmark varies them."""
GROWTH = ".growth.logarithms"
CONSTANTS = {"rate_of_bits": list(RATE_OF_BITS.items()), "smallest_size": SMALLEST_SIZE, "near": NEAR}
"""Constants that a run depends on, part of its fingerprint: checkpoints of a release with other values are rejected."""
MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]


def trained_parameters(model: nn.Module, recipe: Recipe) -> dict[str, nn.Parameter]:
    """The parameters of the student that ``recipe`` trains, by name. Sets ``requires_grad`` of all parameters."""
    thin = recipe.train == "low_rank"
    branch = {id(p) for m in model.modules() if isinstance(m, Student) for p in (m.up, m.down)}
    chosen = {}
    for name, p in model.named_parameters():
        p.requires_grad_(p.is_floating_point() and (not thin or id(p) in branch or name.endswith(GROWTH)))
        if p.requires_grad:
            chosen[name] = p
    return chosen


def parameter_groups(model: nn.Module, parameters: dict[str, nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """One group per parameter; "share" is the factor from the recipe's learning rate to the parameter's."""
    shares: dict[int, float] = {}
    for _, module in students(model):
        q, own = module.quantizer, RATE_OF_BITS[module.quantizer.layer.weight_bits]
        shares |= {id(p): own * _size(p) for p in (module.weight, q.down) if p is not None}
        shares[id(q.up)] = own  # starts at zero; q.down has the weight's magnitude
    groups = []
    for name, p in parameters.items():
        others = recipe.others * (1.0 if name.endswith(GROWTH) else _size(p))
        groups.append({"params": [p], "lr": 0.0, "share": shares.get(id(p), others)})
    return groups


def _size(p: Tensor) -> float:
    return max(p.detach().float().square().mean().sqrt().item(), SMALLEST_SIZE)


class Run:
    """One training run of a student.

    Args:
        pipe: the pipeline in full precision; its denoiser is the teacher.
        student: a copy of the denoiser with student layers.
        prompts: training prompts.
        measure: recorded calls of held-out prompts.
        directory: of the checkpoint, or None.
        settings: all else that the run depends on, as JSON values. A checkpoint belongs to a run with the same
            settings, model, recipe and optimizer.
    """

    def __init__(
        self,
        pipe: Any,
        student: nn.Module,
        prompts: list[str],
        measure: Targets,
        recipe: Recipe,
        *,
        directory: Path | None,
        settings: Mapping[str, Any],
        make_optimizer: MakeOptimizer | None,
    ) -> None:
        self.pipe, self.teacher, self.student = pipe, inner_denoiser(pipe), student
        self.prompts, self.measure, self.recipe = prompts, measure, recipe
        self.directory = directory
        self.parameters = trained_parameters(student, recipe)
        groups = parameter_groups(student, self.parameters, recipe)
        self.names = list(self.parameters)
        self.optimizer = adamw(groups, recipe) if make_optimizer is None else make_optimizer(groups)
        self.efficient = isinstance(self.optimizer, MemoryEfficientOptimizer)
        depends = {**settings, "recipe": recipe.to_json(), "optimizer": _described(self.optimizer), **CONSTANTS}
        self.fingerprint = "" if directory is None else fingerprint(pipe, depends)
        self.average = Average(self.parameters, recipe.average)
        self.best = self.average.now()
        self.progress = Progress()
        self.blocks = find_blocks(student) if recipe.block_steps or recipe.block_weight else []
        self.device = next(student.parameters()).device
        self._targets: tuple[int, Targets] | None = None
        if isinstance(self.optimizer, MemoryEfficientOptimizer):
            self.optimizer.attach(student, max_norm=recipe.clip)
        self._resume()

    # --- steps ---

    def train(self, on_evaluation: Callable[[dict[str, float]], None] | None, save_every: int) -> None:
        """Makes all remaining steps; ends early if the run diverges."""
        p, recipe = self.progress, self.recipe
        if p.step == 0 and not p.history:
            self._evaluate(on_evaluation)
        with progress("recovering", recipe.steps) as bar:
            bar.advance(p.step)
            while p.step < recipe.steps and p.stopped is None:
                start, used = time.monotonic(), time.process_time()
                self._one_step()
                p.seconds += time.monotonic() - start
                p.core_seconds += time.process_time() - used
                if p.stopped is None and (p.step % recipe.evaluate_every == 0 or p.step == recipe.steps):
                    self._evaluate(on_evaluation)
                if p.stopped is not None or p.step % save_every == 0 or p.step == recipe.steps:
                    self.save()
                bar.advance(1, f"held-out error {decibel(p.best)}, loss {p.smooth or 0:.2e}")

    def _one_step(self) -> None:
        p, recipe = self.progress, self.recipe
        loss = self._loss(p.step)
        value = loss.item()
        if not math.isfinite(value):
            self._stop(f"the loss is {value}")
            return
        self._update(loss)
        p.step += 1
        p.smooth = value if p.smooth is None else (1 - LOSS_WEIGHT) * p.smooth + LOSS_WEIGHT * value
        if p.step == recipe.block_steps:
            p.smooth = p.least = None  # the loss has another definition from here on
        elif p.least is None or p.smooth < p.least:
            p.least = p.smooth
        elif p.smooth > recipe.diverged * p.least:
            self._stop(f"the loss is {p.smooth:.3g}, {p.smooth / p.least:.1f} times what it was")

    def _loss(self, step: int) -> Tensor:
        recipe, targets = self.recipe, self.targets(step)
        (args, kwargs), wanted = targets.batch(targets.choose(step, recipe.batch_size, recipe.seed), self.device)
        blockwise = step < recipe.block_steps
        lessons = {}
        if blockwise or recipe.block_weight:
            with torch.no_grad(), recorded_calls(self.teacher, self.blocks) as lessons:
                self.teacher(*args, **kwargs)
        if blockwise:
            return alone(self.student, lessons)
        with ExitStack() as stack:
            outputs = stack.enter_context(recorded_calls(self.student, self.blocks)) if lessons else {}
            y = denoised(self.student(*args, **kwargs))
        loss = (y.float() - wanted.float()).square().mean() / targets.power
        return loss + recipe.block_weight * together(outputs, lessons) if lessons else loss

    def _update(self, loss: Tensor) -> None:
        o, rate = self.optimizer, self.recipe.lr * self.recipe.rate(self.progress.step)
        for group in o.param_groups:
            group["lr"] = rate * group["share"]
        skipped = getattr(o, "skipped", 0)
        loss.backward()
        if not self.efficient:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip)
        o.step()
        o.zero_grad()
        if getattr(o, "skipped", 0) > skipped:
            self._stop("a gradient has NaN or infinite values")
        if self.average.values:
            self.average.update(self._exact(), self.progress.step + 1)

    def _exact(self) -> dict[str, Tensor]:
        if isinstance(self.optimizer, MemoryEfficientOptimizer):
            # a float32 parameter is its own exact value
            f = self.optimizer.fp32
            return {n: p.detach() if p.dtype is torch.float32 else f(p) for n, p in self.parameters.items()}
        return {n: p.detach().float() for n, p in self.parameters.items()}

    def _stop(self, why: str) -> None:
        self.progress.stopped = f"step {self.progress.step}: {why}"

    def targets(self, step: int) -> Targets:
        """The recorded calls that ``step`` learns from. Recorded on first use, from other noise after each refresh."""
        turn = step // self.recipe.refresh if self.recipe.refresh else 0
        if self._targets is None or self._targets[0] != turn:
            self._targets = None
            noise = self.recipe.seed + 1_000_003 * (1 + turn)
            self._targets = turn, record_for(self.recipe, self.pipe, self.prompts, noise)
        return self._targets[1]

    # --- measuring ---

    def _evaluate(self, on_evaluation: Callable[[dict[str, float]], None] | None) -> None:
        p = self.progress
        with self.average.applied():
            error = error_on(self.student, self.measure, self.recipe.batch_size)
        if not math.isfinite(error) or error > self.recipe.diverged * p.best:
            self._stop(f"the error on held-out prompts is {error:.3g}, the best was {p.best:.3g}")
        elif error < p.best:
            p.best, p.best_step, self.best = error, p.step, self.average.now()
        if math.isfinite(error):
            p.history.append({"step": p.step, "error": error, "loss": p.smooth or 0.0})
            if on_evaluation is not None:
                on_evaluation({**p.history[-1], "seconds": p.seconds, "core_seconds": p.core_seconds})

    @torch.no_grad()
    def keep_best(self) -> None:
        """Copies the best parameters into the student."""
        for name, value in self.best.items():
            self.parameters[name].copy_(value)

    # --- disk ---

    def save(self) -> None:
        if self.directory is None:
            return
        tensors = {f"parameters/{n}": v for n, v in self._exact().items()}
        tensors |= {f"average/{n}": v for n, v in self.average.values.items()}
        tensors |= {f"best/{n}": v for n, v in self.best.items()}
        save_run(
            self.directory,
            self.progress,
            tensors | optimizer_tensors(self.optimizer, self.names),
            self.fingerprint,
            self.recipe.to_json(),
        )

    @torch.no_grad()
    def _resume(self) -> None:
        kinds = ["parameters", "best", *(["average"] if self.average.values else [])]
        shapes = {f"{kind}/{n}": p.shape for kind in kinds for n, p in self.parameters.items()}
        recipe = self.recipe.to_json()
        found = None if self.directory is None else load_run(self.directory, self.fingerprint, recipe, shapes)
        if found is None:
            return
        self.progress, tensors = found
        load_optimizer(self.optimizer, self.names, {n: t for n, t in tensors.items() if n.startswith("optimizer/")})
        for name, p in self.parameters.items():
            value = tensors[f"parameters/{name}"].to(p.device)
            if isinstance(self.optimizer, MemoryEfficientOptimizer):
                self.optimizer.set_fp32(p, value)
            else:
                p.copy_(value)
        for kind, values in (("average", self.average.values), ("best", self.best)):
            for name, value in values.items():
                value.copy_(tensors[f"{kind}/{name}"])


def _described(optimizer: Optimizer) -> str:
    """An optimizer's class and options."""
    kind = type(optimizer)
    return f"{kind.__module__}.{kind.__qualname__} {sorted((k, repr(v)) for k, v in optimizer.defaults.items())}"


def adamw(groups: list[dict[str, Any]], recipe: Recipe) -> MemoryEfficientAdamW:
    """The default optimizer. It skips steps with NaN gradients, upon which the run stops."""
    return MemoryEfficientAdamW(
        groups, lr=recipe.lr, betas=BETAS, weight_decay=0.0, moments=recipe.adam_moments, nonfinite="skip"
    )


def record_for(recipe: Recipe, pipe: Any, prompts: Iterable[str], seed: int, title: str = "recording") -> Targets:
    """Records the full-precision trajectories of a recipe."""
    return record(
        pipe,
        list(prompts),
        trajectory=recipe.trajectory,
        seed=seed,
        guidance_scale=recipe.guidance_scale,
        batch_size=recipe.batch_size,
        size=recipe.size(),
        title=title,
    )


@torch.no_grad()
def error_on(model: nn.Module, targets: Targets, batch_size: int) -> float:
    """Relative error power of a model's outputs, sum (y - t)^2 / sum t^2, as a mean over the trajectory lengths."""
    device, errors = next(model.parameters()).device, []
    for start, end in targets.spans:
        noise = power = 0.0
        for samples in torch.arange(start, end).split(batch_size):
            (args, kwargs), wanted = targets.batch(samples, device)
            y = denoised(model(*args, **kwargs))
            noise += (y.double() - wanted.double()).square().sum().item()
            power += wanted.double().square().sum().item()
        errors.append(noise / power if power else math.nan)
    return sum(errors) / len(errors)


def decibel(error: float) -> str:
    """An error power as text, a signal to noise ratio in dB."""
    return "-" if not 0 < error < math.inf else f"{-10 * math.log10(error):.1f} dB"
