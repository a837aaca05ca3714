"""Quantization-aware distillation: trains a quantized denoiser to reproduce the outputs of the full-precision one.

    found = recover(pipe, plan, prompts, steps=1000, checkpoint="recovery")   # pipe.unet is quantized from here on
    save_quantized(pipe.unet, "unet-w2a8", plan=found.plan)

The teacher is the pipeline's own denoiser, whose calls along few-step trajectories are recorded once. The student, a
copy whose layers round as planned, learns its outputs. Weights are trained together with the scales of their rounding
grid, and the resulting codes are packed without requantization, so the stored model is the trained one. BOS output rows
start at those of full precision and are parameters of their own: recomputed from the weights, whose outlier columns
change in training, they would drift hundreds of times as far. A low-rank branch is added to the weight before rounding,
so it ends in the same codes and costs nothing at inference.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..errors import MixDQError, OptimizerError, PlanError
from ..expect import whole
from ..models.pipelines import check_prompts, inner_denoiser
from ..plan import Plan
from ..quantize.config import declare_quantized, mixdq_config, quantize_
from ..quantize.fake import without_fake_quantizer
from ..search.moments_file import fingerprint_of
from .recover_layers import make_student, students
from .recover_loop import MakeOptimizer, Run, error_on, record_for
from .recover_options import Recipe, RecipeOptions, recipe_of
from .recover_state import check_directory
from .recover_targets import Targets

HELD_OUT = 32
"""Most prompts kept for measuring if ``held_out`` is not given; else an eighth of the prompts."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """The result of ``recover``.

    Attributes:
        plan: the plan of the quantized model, with its ranges; its metadata records the training.
        status: "finished", or "stopped, step N: why" if the run diverged.
        best_step: the step whose averaged parameters were kept.
        before, after: relative error power of the denoiser's outputs on held-out prompts, at the start (rounding alone)
            and for the kept parameters.
        real: the same for the packed integer model.
        history: {"step", "error", "loss"} of every measurement.
        seconds, core_seconds: training time; the latter summed over all processor cores.
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
    **options: Unpack[RecipeOptions],
) -> Recovery:
    """Trains the denoiser of ``pipe`` under ``plan`` and quantizes it, in place.

    The pipeline changes only at the very end: an error or Ctrl-C leaves it as it was. Memory: a second denoiser, its
    average and its best state (4 bytes per parameter each), AdamW's moments, and the recorded calls.

    Args:
        pipe: a diffusers pipeline in full precision.
        plan: a calibrated plan. Its weight ranges and rounding give the initial codes ("mse" or "output" start better).
        prompts: training prompts.
        steps: number of optimizer steps.
        held_out: prompts to measure on; default: the last eighth of ``prompts``, which are then not trained on.
        moments: from ``input_moments``, if the plan's rounding needs them.
        checkpoint: a directory. A killed run that is started again continues from there, bit for bit, after recording
            its trajectories again from the same noise. A finished run returns its result at once, and cannot be
            lengthened, because the learning rate falls over all ``steps``.
        save_every: steps between checkpoints.
        make_optimizer: called with parameter groups, each with "params" and "share", the factor from ``lr`` to its
            learning rate; "lr" is set before every step. Default: MemoryEfficientAdamW, stepping inside backward.
        on_evaluation: called with each measurement.
        options: fields of ``Recipe``.

    Raises:
        OptimizerError: an option is unknown or out of range.
        PlanError, QuantizationError: the plan does not fit.
        MixDQError: no prompts.
        CheckpointError: the checkpoint is damaged, of another run or of other shapes; or the directory cannot hold one.
    """
    recipe = recipe_of(steps, options)
    whole(save_every, "save_every")
    learned, measured = _divided(check_prompts(prompts), held_out)
    directory = None if checkpoint is None else Path(checkpoint)
    if directory is not None:
        check_directory(directory)
    teacher = inner_denoiser(pipe)
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
    """Puts the best state of a finished or stopped run into the pipeline's denoiser."""
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
    """A copy of the teacher with student layers; checks first that the trained model can be stored."""
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
    """Copies the trained ``student`` into ``model``: packed weights, and the values of all other parameters."""
    trained = {name: module for name, module in students(student) if module.quantizer.layer.weight_bits < 16}
    packed = {name: module.quantizer.packed(module.weight) for name, module in trained.items()}
    values = dict(student.named_parameters())
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in packed or not name.endswith(".weight"):
            parameter.copy_(values[name])
    for name, weight in packed.items():
        module: Any = model.get_submodule(name)
        module.weight = nn.Parameter(weight, requires_grad=False)
