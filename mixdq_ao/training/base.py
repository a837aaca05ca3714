"""Base class of the optimizers: exact values, the step, the state and its checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ..errors import OptimizerError
from .checkpoint import Ready, checked
from .gradients import finite_everywhere, is_finite, refuse_sparse, surely_finite
from .in_backward import InBackward
from .layout import laid_out_like, local, sharded_like, version
from .loss_scale import LossScale
from .moments import KINDS
from .options import NONFINITE, check_choice, check_number, check_parameter
from .rules import Rule
from .split import REMAINDER, fits, join, split
from .state import common_kind, follow, follow_type, new_state
from .together import lots, update_together
from .update import update

IGNORED = ("maximize", "amsgrad", "capturable", "differentiable", "foreach", "fused")
"""torch's options of a parameter group that these optimizers do not support."""


class MemoryEfficientOptimizer(Optimizer):
    """Optimizes float32 values that are stored as 16-bit parameters and 16-bit remainders.

    Parameters are dense bfloat16, float16 or float32 tensors (float32 has no remainder); the model may be sharded by
    FSDP2. If other code writes to a parameter (its version counter moved since the last step), the written value
    counts and the remainder is dropped. Writes through ``.data``, and those between ``load_state_dict`` and the next
    step, are not detected; the remainder then stays, which is at most half a step of the visible value.

    Attributes:
        skipped: number of steps (when attached: steps of single parameters) skipped because of a NaN or infinite
            gradient.
    """

    rule: ClassVar[Rule]
    late: ClassVar[frozenset[str]] = frozenset()
    """Moments that may start after a parameter's first step, so that a valid state may lack them."""
    skipped: int = 0
    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling and skipping to step()
    _hooks: InBackward | None = None
    _versions: dict[Tensor, tuple[int, int]]
    _places: dict[Tensor, int]

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, nonfinite: str, compile: bool) -> None:
        check_choice(nonfinite, NONFINITE, "nonfinite")
        self._versions, self._places = {}, {}
        super().__init__(params, defaults)
        self.defaults.update(nonfinite=nonfinite, compile=bool(compile))

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy or a pickle."""
        self._drop_stale()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores from a checkpoint (``Ready`` states), a copy or a pickle; the latter two contain the parameters."""
        own = defaultdict(dict, {k: v.tensors if isinstance(v, Ready) else v for k, v in state["state"].items()})
        super().__setstate__({**state, "state": own})
        self._versions, self._places = {}, {}
        if "defaults" in state:
            self._versions = {p: version(p) for p in own}

    @classmethod
    @torch.no_grad()
    def from_fp32(cls, model: nn.Module, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Self:
        """Casts a model's float32 parameters to ``dtype`` in place, and keeps the remainders in a new optimizer.

        Converts one tensor at a time, so that no second copy of the model exists. Frozen parameters are only rounded,
        buffers stay, tied weights stay tied.

        Args:
            model: any module that is not sharded (with FSDP2: convert, shard, then ``set_fp32``).
            dtype: bfloat16 or float16.
            options: of the optimizer.

        Raises:
            OptimizerError: wrong options, a sharded model, or values that float16 cannot hold. The model is unchanged
                then.
        """
        if dtype not in REMAINDER:
            raise OptimizerError(f"dtype is {dtype}, expected torch.bfloat16 or torch.float16")
        named = dict(model.named_parameters())
        if sharded := [name for name, p in named.items() if isinstance(p, DTensor)]:
            raise OptimizerError(
                f"from_fp32: {sharded[0]} is sharded; convert the model first, then shard and set_fp32"
            )
        if large := [name for name, p in named.items() if not fits(p, dtype)]:
            raise OptimizerError(f"{large[0]}: has values of 65520 or more, which {dtype} cannot hold; use bfloat16")
        cls(list(named.items()), **options)  # raises for wrong options before the model changes
        rest: dict[Tensor, Tensor] = {}
        for p in named.values():
            if p.dtype is torch.float32:
                p.data, remainder = split(p.data, dtype)
                if p.requires_grad:
                    rest[p] = remainder
        optimizer = cls(list(named.items()), **options)
        for p in list(rest):
            optimizer._state_of(p)[REMAINDER[dtype]] = rest.pop(p)
        return optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Raises OptimizerError for an unsupported dtype or option, before anything is added."""
        params = param_group["params"]
        param_group = {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}
        where = f"group {len(self.param_groups)}"
        self._check_own(param_group, where)
        self._check_group({**self.defaults, **param_group}, where)
        for i, entry in enumerate(param_group["params"]):
            name, p = entry if isinstance(entry, tuple) else (f"parameter {i} of {where}", entry)
            check_parameter(p, name)
        super().add_param_group(param_group)

    def _check_own(self, group: Mapping[str, Any], where: str) -> None:
        """Raises OptimizerError for torch's options that would be ignored, and for options of the whole optimizer."""
        for name in IGNORED:
            if group.get(name):
                raise OptimizerError(f"{where}: {name} is {group[name]!r}, which is not supported; leave it out")
        for name in ("nonfinite", "compile"):
            if name in group and group[name] != self.defaults.get(name):
                raise OptimizerError(f"{where}: {name} is {group[name]!r}; it is of the whole optimizer, give it there")

    def _check_group(self, options: Mapping[str, Any], where: str) -> None:
        """Raises OptimizerError for options out of range; subclasses check their own too."""
        check_number(options["lr"], f"{where}: lr")
        check_number(options["weight_decay"], f"{where}: weight_decay")
        check_choice(options["moments"], KINDS, f"{where}: moments")

    # --- exact values ---

    @torch.no_grad()
    def fp32(self, param: Tensor) -> Tensor:
        """The exact value of a parameter: a new float32 tensor of its shape (sharded like it)."""
        self._group_of(param)
        visible, state = local(param), self.state.get(param, {})
        name = REMAINDER.get(param.dtype)
        if name not in state or self._was_overwritten(param):
            return sharded_like(visible.to(torch.float32, copy=True), param)
        remainder = laid_out_like(local(state[name]), visible)
        return sharded_like(join(visible, remainder), param)

    @torch.no_grad()
    def set_fp32(self, param: Tensor, value: Tensor) -> None:
        """Sets the exact float32 value of a parameter; the model sees that value rounded.

        Raises:
            OptimizerError: ``value`` is not float32, has another shape or sharding than the parameter, or has finite
                values of 65520 or more for a float16 parameter.
        """
        self._group_of(param)
        visible, exact = local(param), local(value)
        if exact.dtype is not torch.float32 or value.shape != param.shape or exact.shape != visible.shape:
            raise OptimizerError(
                f"{self.name_of(param)}: set_fp32 with {list(exact.shape)} of {exact.dtype}, "
                f"expected {list(visible.shape)} of torch.float32"
            )
        if not fits(exact, param.dtype):
            raise OptimizerError(f"{self.name_of(param)}: set_fp32 with values of 65520 or more, too large for float16")
        exact = laid_out_like(exact, visible)
        if param.dtype in REMAINDER:
            state = self._state_of(param)
            exact, remainder = split(exact, param.dtype)
            local(state[REMAINDER[param.dtype]]).copy_(remainder)
        visible.copy_(exact)
        self._versions[param] = version(param)

    # --- steps ---

    def attach(
        self,
        model: nn.Module,
        *,
        max_norm: float | None = None,
        clip: str = "running",
        loss_scale: LossScale | None = None,
    ) -> InBackward:
        """Steps inside backward from now on: each gradient is used and freed as soon as it is complete.

        ``step()`` then only ends the pass: call it after ``backward()`` as usual, before the learning-rate scheduler.

        Args:
            model: the module with the parameters; errors use its parameter names.
            max_norm: clip gradients to this norm; None: do not clip.
            clip: "running": by an estimate of the norm of all gradients together (``RunningClip``); "tensor": by each
                tensor's own norm.
            loss_scale: call ``backward()`` on ``loss_scale.scale(loss)``.

        Returns:
            A handle with ``accumulating()``, a context for all but the last of the passes that accumulate a gradient,
            and ``remove()``.

        Raises:
            OptimizerError: already attached; a parameter that is not in the model; a sparse embedding; a model in
                DistributedDataParallel, whose gradients are averaged only later.
        """
        if self._hooks is not None:
            raise OptimizerError("attach: this optimizer is attached already; call remove() on its handle first")
        self._hooks = InBackward(self, model, max_norm=max_norm, clip=clip, loss_scale=loss_scale)
        return self._hooks

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Uses the gradients of all parameters that have one, as in torch; when attached, ends the pass.

        Raises:
            OptimizerError: a sparse gradient, or a NaN or infinite one with nonfinite="raise". No parameter and no
                state is changed then (when attached: none of those that had not been stepped yet).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._versions.update({p: version(p) for p in self.state.keys() - self._versions.keys()})  # loading has ended
        try:
            self._step()
        except BaseException:  # else GradScaler's attributes would stay for the next step
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise
        return loss

    def _step(self) -> None:
        if self._hooks is not None:
            self._hooks.end_pass()
            return
        ready = [(group, p) for group, p in self._parameters() if p.grad is not None]
        for _, p in ready:
            if p.grad is not None and p.grad.layout is not torch.strided:
                refuse_sparse(p.grad, self.name_of(p))
        if self._amp("found_inf") or not self._all_finite([p for _, p in ready]):
            self.skipped += 1
            return
        factor = 1.0 / (self._amp("grad_scale") or 1.0)
        for lot in [[entry] for entry in ready] if self.defaults["compile"] else lots(ready, self.state):
            if len(lot) == 1:
                self._apply(*lot[0], factor)
            else:
                self._apply_together(lot[0][0], [p for _, p in lot], factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._hooks is not None:
            self._hooks.forget_pass()

    def _apply(self, group: Mapping[str, Any], p: Tensor, factor: float) -> None:
        """Steps one parameter with its gradient times ``factor``, without checks."""
        state, visible = self._next_state(p), local(p)
        remainder = local(state[REMAINDER[p.dtype]]) if p.dtype in REMAINDER else None
        step = int(state["step"])
        assert p.grad is not None
        numbers, facts = self.rule.scalars(group, step)
        update(
            self.rule,
            visible,
            remainder,
            laid_out_like(local(p.grad), visible),
            [local(state[name]) for name in self._moments(group)],
            numbers=numbers,
            facts=facts,
            factor=factor,
            step=step,
            compiled=self.defaults["compile"],
        )
        self._versions[p] = version(p)

    def _apply_together(self, group: Mapping[str, Any], params: Sequence[Tensor], factor: float) -> None:
        """Steps the parameters of one lot (see ``together.lots``), without checks."""
        states = [self._next_state(p) for p in params]
        step = int(states[0]["step"])
        numbers, facts = self.rule.scalars(group, step)
        options = {"numbers": numbers, "facts": facts, "factor": factor, "step": step}
        update_together(self.rule, params, states, list(self._moments(group)), **options)
        for p in params:
            self._versions[p] = version(p)

    def _next_state(self, p: Tensor) -> dict[str, Any]:
        """The state with its step count increased, and its remainder zeroed if other code wrote to the parameter."""
        state = self._state_of(p)
        state["step"] += 1
        if p.dtype in REMAINDER and self._was_overwritten(p):
            local(state[REMAINDER[p.dtype]]).zero_()
        return state

    def _all_finite(self, params: list[Tensor]) -> bool:
        """Whether a step may use these gradients. Raises OptimizerError instead of returning False if
        nonfinite="raise"."""
        if self.defaults["nonfinite"] == "propagate" or surely_finite([p.grad for p in params if p.grad is not None]):
            return True
        flags = [(p, is_finite(p.grad)) for p in params if p.grad is not None]
        if finite_everywhere(flags):
            return True
        if self.defaults["nonfinite"] == "raise":
            bad = [self.name_of(p) for p, flag in flags if not flag] or ["a parameter's part in another process"]
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise OptimizerError(
                f"{bad[0]}{more}: NaN or infinite values in the gradient; no parameter was changed. "
                'Lower the learning rate, or leave such steps out with nonfinite="skip"'
            )
        return False

    def _amp(self, name: str) -> float:
        """The attribute that torch.amp.GradScaler set for this step, "grad_scale" or "found_inf"; 0 if absent."""
        value = getattr(self, name, None)
        return 0.0 if value is None else float(value)

    # --- state ---

    def _moments(self, group: Mapping[str, Any]) -> dict[str, bool]:
        """{name: whether it is signed} of the moments that a group's options require."""
        return dict(self.rule.moments)

    def _check_late(self, missing: Collection[str], group: Mapping[str, Any], name: str) -> None:
        """Raises OptimizerError if these moments cannot start after a parameter's first step."""

    def _states(
        self, p: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Collection[str]]:
        """A fresh state with everything that ``saved`` may hold, moments stored in the same way as there (the options
        apply from the next step on); and the names that may be absent."""
        kind = common_kind(saved[name] for name in self.rule.moments if name in saved)
        return new_state(p, kind or group["moments"], self.rule.moments), self.late

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        """The state of a parameter, created on first use and adapted to its current options and memory order."""
        state, group = self.state[p], self._group_of(p)
        moments = self._moments(group)
        if "step" not in state:
            state.update(new_state(p, group["moments"], moments))
            self._versions[p] = version(p)
            return state
        if missing := (moments.keys() - state.keys()):
            self._check_late(missing, group, self.name_of(p))
            fresh = new_state(p, group["moments"], moments)
            state.update({name: fresh[name] for name in missing})
        follow_type(state, p)
        follow(state, p, group["moments"], moments, self.name_of)
        return state

    def _was_overwritten(self, p: Tensor) -> bool:
        now = version(p)
        return self._versions.get(p, now) != now

    @torch.no_grad()
    def _drop_stale(self) -> None:
        """Drops the remainders of parameters that other code wrote or cast, before the state is exported."""
        for p, state in self.state.items():
            if state:
                follow_type(state, p)
            if self._was_overwritten(p):
                for name in REMAINDER.values():
                    if name in state:
                        local(state[name]).zero_()
                self._versions[p] = version(p)

    def state_dict(self) -> dict[str, Any]:
        """As in torch: the state itself, not a copy. A checkpoint of it restores the current values of ``fp32``."""
        last = self.register_state_dict_pre_hook(lambda _: self._drop_stale())  # after the user's own
        try:
            return super().state_dict()
        finally:
            last.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a ``state_dict``: the next steps are bit for bit those of the saved run.

        The model's parameters have to be loaded as well, before or after. Therefore a write to a parameter between this
        call and the next step counts as its loading and keeps the remainder: load both first, then change values with
        ``set_fp32``. Hyperparameters come from the checkpoint, as in torch.

        Raises:
            OptimizerError: other parameters, shapes, dtypes or options; nothing is changed then.
        """
        last = self.register_load_state_dict_pre_hook(_check)  # after the user's own, which may adapt the dict
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()

    # --- names ---

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        return ((group, p) for group in self.param_groups for p in group["params"])

    def _group_of(self, p: Tensor) -> dict[str, Any]:
        """The current group of a parameter; loading a checkpoint replaces the groups."""
        if p not in self._places:
            self._places = {q: i for i, group in enumerate(self.param_groups) for q in group["params"]}
        if p in self._places:
            return self.param_groups[self._places[p]]
        raise OptimizerError(f"a tensor {list(p.shape)} of {p.dtype} is not a parameter of this optimizer")

    def name_of(self, p: Tensor) -> str:
        """The name of a parameter for errors; its position if it has no name."""
        if self._hooks is not None and p in self._hooks.names:
            return self._hooks.names[p]
        for i, group in enumerate(self.param_groups):
            for j, other in enumerate(group["params"]):
                if other is p:
                    return group["param_names"][j] if "param_names" in group else f"parameter {j} of group {i}"
        return f"tensor {list(p.shape)}"


def _check(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(optimizer, MemoryEfficientOptimizer)
    o = optimizer
    return checked(state_dict, o.param_groups, o.name_of, o._check_group, o._states)
