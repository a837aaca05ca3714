"""Training a quantized model back to what full precision draws: distillation through the rounding.

    found = recover(pipe, plan, prompts, steps=1000, checkpoint="recovery")   # pipe.unet is quantized from here on
    save_quantized(pipe.unet, "unet-w2a8", plan=found.plan)

The teacher is the pipeline's own denoiser. Its calls along few-step trajectories are recorded once; the student, a copy
whose layers round as planned, learns its outputs. What is trained is what is stored: codes on a grid of scales that is
trained with the weights, whose result goes into packed integers as it is. BOS rows start as those of full precision and
are trained as rows of their own: recomputed from weights whose outlier columns training disturbs, they would wander by
hundreds of times as much. A low-rank branch lies inside the rounding, so it ends in the same codes and costs nothing.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import uncompiled
from ..errors import MixDQError, OptimizerError, PlanError
from ..models.pipelines import check_prompts, denoiser
from ..plan import Plan
from ..quantize.config import declare_quantized, mixdq_config, quantize_
from ..quantize.fake import without_fake_quantizer
from ..search.moments_file import fingerprint_of
from .recover_layers import make_student, students
from .recover_loop import MakeOptimizer, Run, error_on, record_for
from .recover_options import Recipe, recipe_of
from .recover_state import check_directory
from .recover_targets import Targets

HELD_OUT = 32
"""Prompts kept for measuring where none are given: an eighth of them, at most this many."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What ``recover`` found.

    Attributes:
        plan: of the quantized model, with its ranges; its metadata says how it was trained.
        status: "finished", or "stopped, step N: why" where the run diverged.
        best_step: the step whose averaged parameters were kept.
        before, after: relative error power of the denoiser's outputs on held-out prompts: by rounding alone, and of the
            state that was kept.
        real: the same of the packed integers.
        history: {"step", "error", "loss"} of every measurement.
        seconds, core_seconds: of training; the latter of all processor cores together.
    """

    plan: Plan
    status: str
    best_step: int
    before: float
    after: float
    real: float
    history: Sequence[Mapping[str, float]]
    seconds: float
    core_seconds: float

    def to_json(self) -> dict[str, Any]:
        return {n: v for n, v in asdict(replace(self, plan=Plan({}))).items() if n != "plan"}


def recover(
    pipe: Any,
    plan: Plan,
    prompts: Sequence[str],
    *,
    steps: int,
    held_out: Sequence[str] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    make_optimizer: MakeOptimizer | None = None,
    on_evaluation: Callable[[dict[str, float]], None] | None = None,
    **options: Any,
) -> Recovery:
    """Trains the denoiser of ``pipe`` under ``plan`` and quantizes it, in place.

    The pipeline is changed at the very end: an error or Ctrl-C leaves it as it was. Memory: a second denoiser, its
    average and its best state (4 bytes a parameter each), AdamW's moments, and the recorded calls.

    Args:
        pipe: a diffusers pipeline in full precision.
        plan: calibrated. Its weight ranges and rounding give the codes to start from ("mse" or "output" start better).
        prompts: to learn from.
        steps: optimizer steps.
        held_out: prompts to measure on; default: the last eighth of ``prompts``, which then are not learned from.
        moments: from ``input_moments``, where the plan's rounding needs them.
        checkpoint: a directory. A killed run that is started again goes on from there, bit for bit; a finished one
            gives its result at once, and cannot be lengthened: the learning rate falls over all ``steps``.
            Trajectories are recorded again then, from the same noise.
        save_every: steps between checkpoints.
        make_optimizer: called with parameter groups ("params" and "share", the learning rate for an ``lr`` of 1; "lr"
            is set before every step); default: MemoryEfficientAdamW, stepping inside backward.
        on_evaluation: called with each measurement.
        options: fields of ``Recipe``.

    Raises:
        OptimizerError: an option is unknown or out of range. PlanError, QuantizationError: the plan does not fit.
        MixDQError: no prompts. CheckpointError: a checkpoint of another run, damaged, or of other shapes; or a place
        where none can be kept.
    """
    recipe = recipe_of(steps, options)
    if type(save_every) is not int or save_every < 1:
        raise MixDQError(f"save_every is {save_every!r}, expected a whole number of at least 1")
    learned, measured = _divided(check_prompts(prompts), held_out)
    directory = None if checkpoint is None else Path(checkpoint)
    if directory is not None:
        check_directory(directory)
    teacher = uncompiled(denoiser(pipe))
    student = _student(teacher, plan, moments, recipe)
    settings = {"plan": plan.to_json(), "prompts": learned, "held_out": measured}
    settings |= {"moments": None if moments is None else fingerprint_of(moments)}
    exam = record_for(recipe, pipe, measured, recipe.seed, "recording held-out prompts")
    run = Run(
        pipe, student, learned, exam, recipe, directory=directory, settings=settings, make_optimizer=make_optimizer
    )
    run.train(on_evaluation, save_every)
    return _result(run, plan, exam)


def _result(run: Run, plan: Plan, exam: Targets) -> Recovery:
    """The pipeline's denoiser becomes the best state of a run that is over, or stopped by itself."""
    p = run.progress
    if not p.history:
        raise OptimizerError(
            f"nothing to start from: {p.stopped}; check the plan's ranges, or use a wider type than float16"
        )
    run.keep_best()
    if p.stopped is not None:
        warnings.warn(f"recover stopped at {p.stopped}; kept the state of step {p.best_step}", RuntimeWarning, 3)
    before, after = p.history[0]["error"], p.best
    found = _plan_of(run.student, plan, run.recipe, before, after, p.best_step)
    adopt(run.teacher, run.student)
    declare_quantized(run.teacher, found)
    return Recovery(
        plan=found,
        status="finished" if p.stopped is None else f"stopped, {p.stopped}",
        best_step=p.best_step,
        before=before,
        after=after,
        real=error_on(run.teacher, exam, run.recipe.batch_size),
        history=p.history,
        seconds=p.seconds,
        core_seconds=p.core_seconds,
    )


def _divided(prompts: list[str], held_out: Sequence[str] | None) -> tuple[list[str], list[str]]:
    if held_out is not None:
        return prompts, check_prompts(held_out)
    count = min(max(1, len(prompts) // 8), HELD_OUT)
    if len(prompts) < 2:
        raise MixDQError("prompts holds one text, expected at least two (one is kept to measure on), or held_out")
    return prompts[:-count], prompts[-count:]


def _student(teacher: nn.Module, plan: Plan, moments: Mapping[str, Tensor] | None, recipe: Recipe) -> nn.Module:
    """A copy with a student's layers, after every check that it can be stored in the end."""
    if not any(layer.weight_bits < 16 for layer in plan.layers.values()):
        raise PlanError("the plan quantizes no weight, there is nothing to recover")
    mixdq_config(plan, mode="real", moments=moments)
    config = mixdq_config(plan, mode="fake", moments=moments)
    student = copy.deepcopy(teacher)
    quantize_(student, config)
    for module in list(student.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            without_fake_quantizer(module)
    rank = recipe.rank if recipe.train == "low_rank" else 0
    make_student(student, config, scales=recipe.learn_scales, ranges=recipe.learn_ranges, rank=rank)
    return student.eval()


def _plan_of(student: nn.Module, plan: Plan, recipe: Recipe, before: float, after: float, best_step: int) -> Plan:
    layers = {name: module.quantizer.plan() for name, module in students(student)}
    figures = {"recipe": recipe.to_json(), "error_before": before, "error_after": after, "best_step": best_step}
    return replace(plan.with_layers(layers), metadata={**plan.metadata, "recovered": figures})


@torch.no_grad()
def adopt(model: nn.Module, student: nn.Module) -> None:
    """Gives ``model`` what its trained copy learned: packed weights, and the values of all other parameters."""
    trained = {name: module for name, module in students(student) if module.quantizer.layer.weight_bits < 16}
    packed = {name: module.quantizer.packed(module.weight) for name, module in trained.items()}
    values = dict(student.named_parameters())
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in packed or not name.endswith(".weight"):
            parameter.copy_(values[name])
    for name, weight in packed.items():
        module: Any = model.get_submodule(name)
        module.weight = nn.Parameter(weight, requires_grad=False)
