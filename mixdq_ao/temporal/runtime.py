"""A model that stores its weights once and switches precision from one denoising step to the next."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor, nn

from ..compat import uncompiled
from ..errors import PlanError, QuantizationError, ScheduleError
from ..expect import located
from ..layer_plan import LayerPlan
from ..layers import check_module, find_layers
from ..models.pipelines import denoiser
from ..quantize.folds import Fold, Folding, fold_, foldings_of, planned_folds
from ..quantize.quantizer import refuse_unusable
from ..quantize.tensor import is_quantized
from ..registration import PREPARED
from ..search.calibration import Calibration
from .follow import Position, Steps, step_count, timesteps_of
from .layer import LevelLayer, Storage, Switch
from .plan import TemporalPlan


def prepare(
    model: nn.Module,
    plan: TemporalPlan,
    calibration: Calibration | None = None,
    *,
    storage: Storage = "nested",
    keep_full: bool = False,
) -> LevelRuntime:
    """Prepares ``model``, in place, to run at any level of ``plan`` with one copy of the weights.

        runtime = prepare(pipe.unet, plan, calibration)
        pipe.unet = torch.compile(pipe.unet, fullgraph=True)  # one graph for each level
        runtime.follow(pipe)                                  # then call pipe(...) as usual

    Args:
        model: a denoiser in full precision.
        plan: its levels give each layer's bits. 16-bit weights run as 8-bit weights with 16-bit activations, unless
            ``keep_full``.
        calibration: provides the ranges that the levels' plans lack.
        storage: "nested": a 4-bit weight is the upper half of the 8-bit one (numerics: ``nested``), so all levels
            together take the bytes of one 8-bit model; 2-bit weights run at 4 bits, which read the same bytes. "own":
            each width has the codes that ``quantize_`` would give it; 4-bit codes take half of those bytes in addition,
            2-bit codes a quarter.
        keep_full: also keep the original weights, so that 16 bit is exact.

    torch.compile makes one graph per level, at the level's first call, and no more while sizes stay. If the batch size
    changes there are up to three graphs per level (the first size, size 1, any size); a changing height and a changing
    width add one each. Beyond ``torch._dynamo.config.recompile_limit`` (8) graphs, compilation fails with
    ``fullgraph=True`` and falls back to eager execution without it: raise the limit to the number of graphs.

    Raises:
        PlanError, QuantizationError, ScheduleError: name the level and the layer; the model is unchanged then.
    """
    if storage not in get_args(Storage):
        raise ScheduleError(f"storage is {storage!r}, expected 'nested' or 'own'")
    model, plan = check_module(model), TemporalPlan.expect(plan, "plan")
    if any(isinstance(m, LevelLayer) for m in model.modules()):
        raise QuantizationError("the model is prepared for levels already; load the original model to prepare anew")
    plan = plan if calibration is None else plan.with_calibration(calibration)
    plan.validate(len(plan.steps), model)
    layers = find_layers(model)
    forms = {name: _forms(name, plan, keep_full) for name in layers}
    forms = {name: per_level for name, per_level in forms.items() if per_level is not None}
    for name, per_level in forms.items():
        _check(name, layers[name], per_level, storage)
    switch, bos = Switch(plan.steps[0]), _bos_embedding(plan)
    fold_(model, _folds(model, plan))
    for name, per_level in forms.items():
        parent, _, attribute = name.rpartition(".")
        embedding = None if bos is None else bos.to(layers[name].weight.device)
        layer = LevelLayer(layers[name], per_level, switch, bos_embedding=embedding, storage=storage)
        setattr(model.get_submodule(parent), attribute, layer)
    _keep_projections_apart(model)
    for declare in PREPARED:
        declare(model)
    return LevelRuntime(model, plan, switch)


class LevelRuntime:
    """A prepared model. Setting ``level`` switches all its layers.

    Attributes:
        model: the denoiser.
        level: name of the level that the model runs at.
        plan: the schedule that ``follow`` applies.
        followed: the pipeline that is followed, or None.
    """

    def __init__(self, model: nn.Module, plan: TemporalPlan, switch: Switch) -> None:
        self.model, self._switch, self._levels = model, switch, dict(plan.levels)  # fixed once prepared
        self._plan = self._resampled = plan
        self.followed: Any = None
        self._handles: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> LevelRuntime:
        """Copies the followed pipeline too, unless the model is copied without it: then both follow the same one."""
        clone = memo[id(self)] = copy.copy(self)
        alone = id(self.model) in memo and id(self.followed) not in memo
        clone.followed = self.followed if alone else copy.deepcopy(self.followed, memo)
        vars(clone).update({n: copy.deepcopy(v, memo) for n, v in vars(self).items() if n != "followed"})
        return clone

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickling, without the pipeline: not every pipeline can be pickled."""
        return vars(self) | {"followed": None}

    @property
    def level(self) -> str:
        return self._switch.level

    @level.setter
    def level(self, name: str) -> None:
        if name not in self._levels:
            raise ScheduleError(f"level is {name!r}, the model was prepared for {', '.join(self._levels)}")
        self._switch.level = name

    @property
    def plan(self) -> TemporalPlan:
        return self._plan

    @plan.setter
    def plan(self, plan: TemporalPlan) -> None:
        for name in dict.fromkeys(plan.steps):
            if name not in self._levels:
                raise ScheduleError(f"level {name!r}: the model was prepared for {', '.join(self._levels)}")
        self._plan = self._resampled = plan

    def follow(self, pipe: Any, *, resample: bool = False) -> None:
        """Makes every call of ``pipe`` from now on run each denoising step at the plan's level for it.

        Compile the denoiser first. The step is found from the denoiser's timestep argument and the timesteps of
        ``pipe.scheduler``, which may be replaced at any time. All calls of one step (guidance, second-order schedulers)
        run at one level, and img2img begins in the middle of the schedule. To run another pipeline that shares the
        model but has its own scheduler, follow that pipeline. A copy (``copy.deepcopy(pipe)``) is followed
        automatically; after unpickling a runtime, call ``follow`` again.

        Args:
            resample: a run with another number of steps uses ``plan.resampled(steps)``, which warns, instead of
                raising ScheduleError.
        """
        module = denoiser(pipe)
        if uncompiled(module) is not self.model:
            raise ScheduleError(f"the pipeline's {type(module).__name__} is not the model that was prepared")
        self.unfollow()
        self.followed = pipe
        follower = _Follower(self, resample)
        hooks: dict[nn.Module, Any] = {self.model: _Heir(follower)} | {module: follower}
        # run before all other hooks, since some of them (reuse_text_projections) read the level
        self._handles = [m.register_forward_pre_hook(hook, with_kwargs=True, prepend=True) for m, hook in hooks.items()]

    def unfollow(self) -> None:
        """Stops following; the level stays until it is set."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.followed = [], None

    def plan_for(self, steps: int) -> TemporalPlan:
        """The plan, resampled to a number of steps; cached for the last number."""
        if steps != len(self._resampled.steps):
            self._resampled = self._plan.resampled(steps)
        return self._resampled

    def bytes(self) -> int:
        """Bytes of the prepared layers: codes, scales, zero points, BOS rows, biases; shared memory counts once."""
        held = {}
        for layer in self.model.modules():
            if isinstance(layer, LevelLayer):
                for tensor in (*layer.parameters(), *layer.buffers()):
                    storage = tensor.untyped_storage()
                    held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())


class _Follower:
    """A forward pre-hook that sets the level; runs outside compiled graphs. An object rather than a closure, so that it
    is copied and pickled with the model."""

    def __init__(self, runtime: LevelRuntime, resample: bool) -> None:
        self.runtime, self.resample, self.steps = runtime, resample, Steps()

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = _timestep(args, kwargs)
        if self.runtime.followed is None:
            raise ScheduleError(
                "the model followed a pipeline, which was not stored with it; store the runtime of prepare(), and "
                "runtime.follow(pipe) when it is loaded"
            )
        scheduler, plan = self.runtime.followed.scheduler, self.runtime.plan
        timesteps, order = timesteps_of(scheduler), getattr(scheduler, "order", 1)
        as_found = order == 1 and len(timesteps) == len(plan.steps)  # even if timesteps repeat
        if self.resample and not as_found:
            plan = self.runtime.plan_for(step_count(timesteps, order))
        step = self.steps.step_of(timesteps, timestep, len(plan.steps), order, Position.of(scheduler))
        self.runtime.level = plan.steps[step]


def _timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The timestep a denoiser is called with. Raises ScheduleError if there is none."""
    named = next((kwargs[name] for name in ("timestep", "timesteps", "t") if name in kwargs), None)
    if named is None and len(args) < 2:
        raise ScheduleError("the model was called without a timestep, expected it second, or as timestep=")
    return args[1] if named is None else named


class _Heir:
    """A placeholder hook on the model inside a compiled one. torch drops the wrapper's own hooks on copy and pickle;
    this one is copied and unpickled as the follower."""

    def __init__(self, follower: _Follower) -> None:
        self.follower = follower

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pass

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.follower,)


def _itself(follower: _Follower) -> _Follower:
    return follower


def _keep_projections_apart(model: nn.Module) -> None:
    """Makes diffusers' fusing of projections raise: it would copy the current level's weights into a plain layer."""
    for module in model.modules():
        for name in ("fuse_qkv_projections", "fuse_projections"):
            if hasattr(type(module), name):
                setattr(module, name, _refuse_fusing)


def _refuse_fusing(*args: Any, **kwargs: Any) -> NoReturn:
    raise QuantizationError(
        "the model is prepared for a precision per step, and projections fused into one would have the present level's "
        "weights at every level; leave them apart"
    )


def _folds(model: nn.Module, plan: TemporalPlan) -> dict[Fold, Folding]:
    """Smoothing and rotation, which must be the same at all levels because these share the weights."""
    foldings: dict[str, Folding] = {}
    for level, own in plan.levels.items():
        for name, folding in foldings_of(own.layers if own is not None else {}).items():
            if foldings.setdefault(name, folding) != folding:
                raise ScheduleError(
                    f"layer {name!r}: level {level!r} has another smoothing or rotation than the levels before it; "
                    "calibrate all levels with one calibration"
                )
    return planned_folds(model, foldings)


def _forms(name: str, plan: TemporalPlan, keep_full: bool) -> dict[str, LayerPlan | None] | None:
    """{level: how the layer runs there, None for its own weight}; None if no level quantizes the layer."""
    asked = {n: p.layers.get(name, LayerPlan()) if p is not None else LayerPlan() for n, p in plan.levels.items()}
    if not any(layer.quantized for layer in asked.values()):
        return None
    split = next((v.split for v in asked.values() if v.split is not None), None)
    forms: dict[str, LayerPlan | None] = {}
    for level, layer in asked.items():
        if layer.quantized and layer.split != split:
            raise ScheduleError(f"layer {name!r}: level {level!r} has split {layer.split}, another level {split}")
        if layer.quantized and layer.weight_bits == 16:
            raise PlanError(
                f"layer {name!r}: level {level!r} has 16-bit weights with {layer.act_bits}-bit activations, which "
                "have no integer product; give both 16 bits"
            )
        exact = not layer.quantized and keep_full
        forms[level] = None if exact else layer if layer.quantized else LayerPlan(weight_bits=8, split=split)
    return forms


def _check(name: str, layer: nn.Module, forms: Mapping[str, LayerPlan | None], storage: Storage) -> None:
    if is_quantized(layer.weight):
        raise QuantizationError(f"layer {name!r} is quantized already; load the original model to prepare it")
    with located(f"layer {name!r}", QuantizationError):
        refuse_unusable(layer.weight)  # type: ignore[arg-type]
    known: dict[int, LayerPlan] = {}
    for level, form in forms.items():
        if form is None or form.weight_bits == 16:
            continue
        if form.needs_moment or (storage == "nested" and form.weight_range != "minmax"):
            what = "'nearest' and 'minmax'" + (" ('mse' has storage='own')" if storage == "nested" else " or 'mse'")
            raise ScheduleError(
                f"layer {name!r}: level {level!r} has rounding={form.rounding!r} and "
                f"weight_range={form.weight_range!r}, which weights of several levels cannot have; expected {what}"
            )
        other = known.setdefault(form.weight_bits, form)
        for field in ("symmetric", "weight_range"):
            if storage == "own" and getattr(other, field) != getattr(form, field):
                raise ScheduleError(
                    f"layer {name!r}: level {level!r} has {field}={getattr(form, field)!r} at {form.weight_bits} bits, "
                    f"another level {getattr(other, field)!r}; they share their codes"
                )


def _bos_embedding(plan: TemporalPlan) -> Tensor | None:
    rows = {p.bos_embedding for p in plan.levels.values() if p is not None and p.bos_embedding is not None}
    if len(rows) > 1:
        raise ScheduleError("levels have different bos_embedding; calibrate all of them with one calibration")
    return torch.tensor(rows.pop(), dtype=torch.float32) if rows else None
