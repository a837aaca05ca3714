"""``quantization_config.runtime.diffusion_step_policy``, version 1, in a denoiser's config.json.

diffusers, vLLM-omni and SGLang read it: the first and the last steps of a run use 16-bit activations with the same
weights ("a16"), all others the quantization of the checkpoint ("native"). There the counts are set by hand. This module
converts between policies and TemporalPlans: a searched schedule can be exported if it has that form. As in those
readers, a missing or an unknown field is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ScheduleError
from ..expect import expect, located
from ..jsonfile import read_object
from ..plan import Plan
from .plan import TemporalPlan

FIELD = "quantization_config.runtime.diffusion_step_policy"
FIXED = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "default_mode": "native",
    "overlap": "a16",
}
FIELDS = (*FIXED, "scope", "first_steps", "last_steps", "reasoner")
NATIVE, A16 = "native", "a16"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPolicy:
    """A policy.

    Attributes:
        first, last: number of denoising steps with 16-bit activations at the beginning and at the end of a run.
        scope: the pipeline components it applies to.
        reasoner: "a16" or "native", for models whose text is read by a second tower; not used here.
    """

    first: int
    last: int
    scope: tuple[str, ...] = ("transformer",)
    reasoner: str = A16

    def __post_init__(self) -> None:
        for name, count in (("first_steps", self.first), ("last_steps", self.last)):
            _expect(type(count) is int and count >= 0, f"{name}.count", count, "a whole number >= 0")
        names = isinstance(self.scope, tuple) and all(isinstance(s, str) and s for s in self.scope)
        _expect(names and bool(self.scope), "scope", self.scope, "a non-empty list of component names")
        _expect(self.reasoner in (A16, NATIVE), "reasoner", self.reasoner, "'a16' or 'native'")

    def modes(self, steps: int) -> tuple[str, ...]:
        """The mode of each of ``steps`` steps. A run of one step is native whatever the counts, as readers treat it as
        a warm-up."""
        if steps == 1:
            return (NATIVE,)
        return tuple(A16 if i < self.first or i >= steps - self.last else NATIVE for i in range(steps))

    def to_json(self) -> dict[str, Any]:
        """The policy with all its fields."""
        steps = {n: {"count": c, "mode": A16} for n, c in (("first_steps", self.first), ("last_steps", self.last))}
        fields = {**FIXED, **steps, "scope": list(self.scope), "reasoner": self.reasoner}
        order = ("schema_version", "type", "index_space", "scope", "default_mode", "first_steps", "last_steps")
        return {name: fields[name] for name in (*order, "overlap", "reasoner")}

    @classmethod
    def from_json(cls, value: object) -> StepPolicy:
        """Raises ScheduleError naming the field, its value and what was expected."""
        policy = _object("", value, FIELDS)
        for name, expected in FIXED.items():
            same = policy[name] == expected and type(policy[name]) is type(expected)
            _expect(same, name, policy[name], repr(expected))
        counts = {}
        for name in ("first_steps", "last_steps"):
            part = _object(name, policy[name], ("count", "mode"))
            _expect(part["mode"] == A16, f"{name}.mode", part["mode"], "'a16'")
            counts[name] = part["count"]
        scope = policy["scope"]
        _expect(isinstance(scope, list), "scope", scope, "a non-empty list of component names")
        return cls(
            first=counts["first_steps"], last=counts["last_steps"], scope=tuple(scope), reasoner=policy["reasoner"]
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> StepPolicy | None:
        """The policy in a denoiser's config, given as a mapping or as the path of its config.json; None if absent."""
        source = "config" if isinstance(config, Mapping) else os.fspath(config)
        here: Any = config if isinstance(config, Mapping) else read_config(config)
        path = FIELD.split(".")
        for depth, name in enumerate(path):
            if not isinstance(here, Mapping):
                raise ScheduleError(f"{source}: {'.'.join(path[:depth])} is {here!r}, expected an object")
            if here.get(name) is None:
                return None
            here = here[name]
        with located(source, ScheduleError):
            return cls.from_json(here)

    def into_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a denoiser's config with this policy. Raises ScheduleError if it has no quantization_config: only
        a quantized model has precisions to switch."""
        quantization = config.get("quantization_config")
        if not isinstance(quantization, Mapping):
            raise ScheduleError("the config has no quantization_config; a step policy belongs to a quantized model")
        runtime = quantization.get("runtime") or {}
        _expect(isinstance(runtime, Mapping), "runtime", runtime, "an object")
        runtime = {**runtime, "diffusion_step_policy": self.to_json()}
        return {**config, "quantization_config": {**quantization, "runtime": runtime}}


def export_policy(plan: TemporalPlan, *, scope: tuple[str, ...] = ("transformer",), reasoner: str = A16) -> StepPolicy:
    """The policy equivalent to ``plan`` at its number of steps.

    Raises:
        ScheduleError: no policy is: more than two levels, 16-bit activations elsewhere than at the ends, other weights
            at the 16-bit steps, or a single step. Names the step or level at fault.
    """
    steps = len(plan.steps)
    modes = _modes(plan)
    first = next((i for i, mode in enumerate(modes) if mode == NATIVE), steps)
    last = next((i for i, mode in enumerate(reversed(modes)) if mode == NATIVE), 0)
    policy = StepPolicy(first=first, last=last, scope=tuple(scope), reasoner=reasoner)
    for i, (wanted, said) in enumerate(zip(modes, policy.modes(steps), strict=True)):
        if wanted != said:
            why = "a run of one step is always native" if steps == 1 else "only the first and last steps can be a16"
            raise ScheduleError(f"step {i} is {plan.steps[i]!r} ({wanted}), which the policy cannot say: {why}")
    return policy


def _modes(plan: TemporalPlan) -> list[str]:
    """ "a16" or "native" for each step. Raises ScheduleError if the levels do not map to these two."""
    used = [name for name, count in plan.counts.items() if count]
    quantized = [name for name in used if not _sixteen(plan.levels[name])]
    if len(quantized) > 1 or len(used) > 2:
        raise ScheduleError(
            f"the schedule uses {', '.join(used)}; the policy knows two levels: the quantized model and the same "
            "with 16-bit activations"
        )
    if not quantized:
        raise ScheduleError(f"the schedule uses {', '.join(used)}, none with quantized activations: nothing to switch")
    native, others = plan.levels[quantized[0]], [plan.levels[n] for n in used if n not in quantized]
    for name, other in zip((n for n in used if n not in quantized), others, strict=True):
        if other is not None and _weights(other) != _weights(native):
            raise ScheduleError(
                f"level {name!r} has other weights than {quantized[0]!r}; the policy switches activations only"
            )
    return [NATIVE if name == quantized[0] else A16 for name in plan.steps]


def import_policy(policy: StepPolicy, steps: int, native: Plan, name: str = "native") -> TemporalPlan:
    """The plan equivalent to a policy at ``steps`` steps; its level "a16" is ``native`` with 16-bit activations."""
    if name == A16:
        raise ScheduleError(f"name is {name!r}, expected another than that of the 16-bit level")
    layers = {n: replace(v, act_bits=16, act_range=None, split_act_range=None) for n, v in native.layers.items()}
    levels = {A16: Plan(layers, native.metadata, native.bos_embedding), name: native}
    chosen = tuple(A16 if mode == A16 else name for mode in policy.modes(steps))
    return TemporalPlan(levels, chosen, metadata={"source": FIELD})


def _sixteen(plan: Plan | None) -> bool:
    return plan is None or all(layer.act_bits == 16 for layer in plan.layers.values())


def _weights(plan: Plan | None) -> dict[str, tuple[int, bool | None]]:
    layers = {} if plan is None else plan.layers
    return {n: (v.weight_bits, v.symmetric) for n, v in layers.items() if v.weight_bits < 16}


def _expect(condition: bool, name: str, value: object, expected: str) -> None:
    expect(condition, f"diffusion_step_policy: {name}", value, expected, ScheduleError)


def _object(name: str, value: object, fields: tuple[str, ...]) -> dict[str, Any]:
    """``value``, which must be an object with exactly these fields. Raises ScheduleError."""
    _expect(isinstance(value, Mapping), name or "policy", value, "an object")
    assert isinstance(value, Mapping)
    prefix = f"{name}." if name else ""
    if unknown := sorted(map(str, set(value) - set(fields))):
        raise ScheduleError(f"diffusion_step_policy: unknown field {prefix}{unknown[0]}; expected {', '.join(fields)}")
    if missing := [f for f in fields if f not in value]:
        raise ScheduleError(f"diffusion_step_policy: field {prefix}{missing[0]} is missing; all are required")
    return dict(value)


def read_policy(path: str | os.PathLike[str]) -> StepPolicy:
    """The policy in a denoiser's config.json, or in a file of its own. Raises ScheduleError naming the file."""
    config = read_config(path)
    with located(os.fspath(path), ScheduleError):
        found = StepPolicy.from_config(config) if "schema_version" not in config else StepPolicy.from_json(config)
    if found is None:
        raise ScheduleError(f"{os.fspath(path)}: has no {FIELD}, nor is it one")
    return found


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A denoiser's config.json, parsed. Raises ScheduleError naming the file."""
    return read_object(path, ScheduleError, "; expected a model's config.json")
