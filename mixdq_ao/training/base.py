"""What the optimizers share: exact values, the step, the state and its checkpoints."""

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
"""torch's options for a group that these steps do not have."""


class MemoryEfficientOptimizer(Optimizer):
    """Steps float32 values that are stored as 16-bit parameters and 16-bit remainders.

    Parameters are bfloat16, float16 or float32 (these have no remainder) and dense; the model may be sharded by FSDP2.
    A parameter that someone else writes to (its version counter moved since the last step) has from then on the
    written value: its remainder is dropped. Writes through ``.data``, and those between ``load_state_dict`` and the
    next step, are not seen; the remainder then stays, which is at most half a step of the visible value.

    Attributes:
        skipped: steps (attached: steps of single parameters) that were left out for a NaN or infinite gradient.
    """

    rule: ClassVar[Rule]
    late: ClassVar[frozenset[str]] = frozenset()
    """Moments that may begin after a parameter's first step: a state may lack them until its next one."""
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
        """For a copy, or a pickle."""
        self._drop_stale()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a checkpoint (``Ready`` states), a copy, or a pickle; these two bring their parameters along."""
        own = defaultdict(dict, {k: v.tensors if isinstance(v, Ready) else v for k, v in state["state"].items()})
        super().__setstate__({**state, "state": own})
        self._versions, self._places = {}, {}
        if "defaults" in state:
            self._versions = {p: version(p) for p in own}

    @classmethod
    @torch.no_grad()
    def from_fp32(cls, model: nn.Module, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Self:
        """Turns a model's float32 parameters into ``dtype`` in place, and keeps the rest of each in a new optimizer.

        One tensor at a time, so that no second copy of the model is ever alive. Frozen parameters are only rounded,
        buffers stay, tied weights stay tied.

        Args:
            model: any module that is not sharded (with FSDP2: convert, shard, then ``set_fp32``).
            dtype: bfloat16 or float16.
            options: of the optimizer.

        Raises:
            OptimizerError: wrong options, a sharded model, or values that float16 cannot hold; the model is not
                changed then.
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
        cls(list(named.items()), **options)  # says what is wrong before the model changes
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
        """As in torch. Raises OptimizerError for a dtype or an option that is not supported; nothing is added then."""
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
        """Raises OptimizerError for options of torch's that would be ignored, and for what only all groups can have."""
        for name in IGNORED:
            if group.get(name):
                raise OptimizerError(f"{where}: {name} is {group[name]!r}, which is not supported; leave it out")
        for name in ("nonfinite", "compile"):
            if name in group and group[name] != self.defaults.get(name):
                raise OptimizerError(f"{where}: {name} is {group[name]!r}; it is of the whole optimizer, give it there")

    def _check_group(self, options: Mapping[str, Any], where: str) -> None:
        """Raises OptimizerError for options out of range; subclasses add theirs."""
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
        """Give a parameter an exact float32 value; what the model sees is that value rounded.

        Raises:
            OptimizerError: ``value`` is not float32, of the parameter's shape, and sharded like it; or the parameter
                is float16 and ``value`` has finite values of 65520 or more.
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
        """Step inside backward from now on: each gradient is used and freed as soon as it is complete.

        ``step()`` then only ends the pass: call it after ``backward()`` as ever, before the learning-rate scheduler.

        Args:
            model: holds the parameters; its names are used in errors.
            max_norm: clip gradients to this norm; None: do not.
            clip: "running": the norm of all gradients together, as far as it is known (``RunningClip``); "tensor":
                each tensor's own norm.
            loss_scale: whose ``scale(loss)`` is what backward starts from.

        Returns:
            a handle with ``accumulating()`` (a context for all passes but the last of an accumulated gradient) and
            ``remove()``.

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
        """Use the gradients that are there, as in torch (attached: end the pass).

        Raises:
            OptimizerError: a sparse gradient, or a NaN or infinite one with nonfinite="raise"; no parameter and no
                state is changed then (attached: of those that are left).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._versions.update({p: version(p) for p in self.state.keys() - self._versions.keys()})  # loading has ended
        try:
            self._step()
        except BaseException:  # torch.amp.GradScaler would leave them to the next step
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
        """One step of one parameter with its gradient times ``factor``; nothing is checked."""
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
        """The same for parameters of one lot (see ``together.lots``)."""
        states = [self._next_state(p) for p in params]
        step = int(states[0]["step"])
        numbers, facts = self.rule.scalars(group, step)
        options = {"numbers": numbers, "facts": facts, "factor": factor, "step": step}
        update_together(self.rule, params, states, list(self._moments(group)), **options)
        for p in params:
            self._versions[p] = version(p)

    def _next_state(self, p: Tensor) -> dict[str, Any]:
        """The state, counting one step more; the remainder is dropped where someone else wrote the parameter."""
        state = self._state_of(p)
        state["step"] += 1
        if p.dtype in REMAINDER and self._was_overwritten(p):
            local(state[REMAINDER[p.dtype]]).zero_()
        return state

    def _all_finite(self, params: list[Tensor]) -> bool:
        """Raises OptimizerError instead of saying no where nonfinite="raise"."""
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
        """What torch.amp.GradScaler left for this step: "grad_scale" or "found_inf"; 0 where there is none."""
        value = getattr(self, name, None)
        return 0.0 if value is None else float(value)

    # --- state ---

    def _moments(self, group: Mapping[str, Any]) -> dict[str, bool]:
        """{name: whether it has a sign} of the moments that a group's options call for."""
        return dict(self.rule.moments)

    def _check_late(self, missing: Collection[str], group: Mapping[str, Any], name: str) -> None:
        """Raises OptimizerError where these parts of a state cannot begin after a parameter's first step."""

    def _states(
        self, p: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Collection[str]]:
        """All that ``saved`` may hold, stored as it is there (options count from the next step); what may be absent."""
        kind = common_kind(saved[name] for name in self.rule.moments if name in saved)
        return new_state(p, kind or group["moments"], self.rule.moments), self.late

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        """The state, made when first asked for; follows the options, and the parameter's order of memory."""
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
        """Drops the remainders of parameters that someone else wrote or cast, before their state is handed out."""
        for p, state in self.state.items():
            if state:
                follow_type(state, p)
            if self._was_overwritten(p):
                for name in REMAINDER.values():
                    if name in state:
                        local(state[name]).zero_()
                self._versions[p] = version(p)

    def state_dict(self) -> dict[str, Any]:
        """As in torch: the state itself, not a copy. What ``fp32`` says now is what a checkpoint of it brings back."""
        last = self.register_state_dict_pre_hook(lambda _: self._drop_stale())  # after the user's own
        try:
            return super().state_dict()
        finally:
            last.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave: the next steps are bit for bit those of the run that was saved.

        The model's own parameters belong to it (load them before or after). So what is written to a parameter between
        this and the next step counts as its loading and keeps the remainder: load both first, then change values with
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
        """The group of a parameter, as it is now: loading a checkpoint replaces the groups."""
        if p not in self._places:
            self._places = {q: i for i, group in enumerate(self.param_groups) for q in group["params"]}
        if p in self._places:
            return self.param_groups[self._places[p]]
        raise OptimizerError(f"a tensor {list(p.shape)} of {p.dtype} is not a parameter of this optimizer")

    def name_of(self, p: Tensor) -> str:
        """How errors call a parameter: its name where it is known, else its place."""
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
