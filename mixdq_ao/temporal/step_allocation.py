"""Allocates bits per layer and denoising step as levels of a TemporalPlan: MPQ-Diff (arXiv 2412.00144) within a run.

``runtime.prepare`` can switch these from step to step:

- Activation bits of every layer, freely.
- Weight bits of every layer, among the stored widths. Storage "nested" stores every weight once, at 8 bits, and reads
  all of it or its 4-bit half: 4 and 8 bits, in the bytes of one 8-bit model, whatever the plan. Storage "own" stores a
  copy for each width that a layer has at some step: 2, 4 and 8 bits, in the bytes of all copies.

So bits that differ between steps save memory traffic and time, not memory; the budget is a mean over the steps. To save
memory, ``weights="per layer"`` keeps a layer's weight bits the same at all steps, so that only activations differ.

Each sampled step becomes a level, which serves the steps nearest to it. Each level is one compiled graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import AllocationError
from ..expect import expect
from ..layer_plan import ACT_BITS, WEIGHT_BITS
from ..search.additive import additive_errors
from ..search.arrays import Array
from ..search.orthogonality import DECAY, Orthogonality, place_weights, sampled_steps
from ..search.orthogonality_allocate import Form, check_form, choose, worth
from ..search.request import Demand, check_request, positive, protected_names
from ..search.sensitivity import Kind, LayerSensitivity, Sensitivity
from .layer import Storage
from .plan import TemporalPlan
from .step_levels import Served, to_levels

Weights = Literal["per step", "per layer"]
OFFERED: dict[Storage, tuple[int, ...]] = {"nested": (4, 8), "own": (2, 4, 8)}


def allocate_steps(
    measured: Orthogonality | Mapping[int, Sensitivity],
    *,
    steps: int | None = None,
    weight_bits: float,
    act_bits: float | None = None,
    form: Form = "error",
    beta: float | None = None,
    decay: float = DECAY,
    weights: Weights = "per step",
    storage: Storage = "nested",
    weight_choices: Sequence[int] | None = None,
    act_choices: Sequence[int] | None = None,
    protect: Iterable[str] = (),
    time_limit: float = 60.0,
) -> TemporalPlan:
    """Finds the bits of every layer at every step; the plan has no ranges yet (see ``TemporalPlan.with_calibration``).

    Args:
        measured: importances from ``orthogonality``; or {step: Sensitivity} with each layer's errors at the sampled
            steps (from ``step_probe.probe_steps``), whose sum is minimised (``form``, ``beta`` and ``decay`` are
            ignored then).
        steps: number of steps of the run; not needed with an Orthogonality, which has its own.
        weight_bits, act_bits: averages over weights or input elements and over the steps of the run. With the default
            choices, act_bits of None or from 8 up means 8 everywhere, and 16 leaves activations unquantized. Where a
            weight gets 16 bits, its activation stays unquantized too (no integer product takes the two) and is not
            counted in the average.
        form: "linear", "integer" or "error", as for ``allocate_orthogonal``, of theta_i of each sampled step, weighted
            by the sum of exp(decay p) over the run's steps it represents.
        beta, decay: see ``Orthogonality.step_importance`` and ``step_weights``.
        weights: "per step"; or "per layer": the weight bits of a layer are the same at all steps.
        storage: the ``storage`` that ``prepare`` will be called with. Determines the weight bits offered by default:
            4 and 8 for "nested"; 2, 4 and 8 for "own".
        weight_choices, act_choices: bits offered; activations {4, 8} by default.
        protect: layers kept at 16 bits.
        time_limit: seconds for each of the two programs.

    Levels are named after the steps they serve ("0-1"), most weight bits first. Their cost is their mean weight bits /
    16; if two levels have the same, the plan has no costs. Steps with equal bits share a level.

    Raises:
        AllocationError: an argument is wrong, or no plan fits a budget.
        SensitivityError: ``beta``, ``decay`` or ``steps`` is wrong.
    """
    check_form(form)
    _expect(weights, get_args(Weights), "weights")
    _expect(storage, get_args(Storage), "storage")
    subject = _subject(measured, steps, protect)
    choices = _offer("weight_choices", OFFERED[storage] if weight_choices is None else weight_choices, WEIGHT_BITS)
    if storage == "nested" and 2 in choices:
        raise AllocationError(
            "weight_choices holds 2, but nested storage runs those layers at 4 bits; use storage='own'"
        )
    demand = _act_demand(subject, weight_bits, act_bits, act_choices, time_limit)
    programs = _Programs(measured, subject, form=form, beta=beta, decay=decay, time_limit=time_limit)
    every = np.full((len(subject.sampled), len(subject.layers)), True)
    found = programs.solve("weight", weight_bits, choices, every, together=weights == "per layer")
    quantized, acts = found < 16, np.full(every.shape, 16)
    if demand.fixed is not None:
        acts[quantized] = demand.fixed
    elif quantized.any():
        acts = programs.solve("act", act_bits, demand.choices["content"], quantized)
    objective = f"importance, form {form}" if isinstance(measured, Orthogonality) else "measured errors"
    metadata = {"source": "allocate_steps", "objective": objective, "weights": weights, "storage": storage}
    return to_levels(subject, found, acts, metadata)


def _every_layer(measured: Orthogonality | Mapping[int, Sensitivity]) -> Mapping[str, LayerSensitivity]:
    """All layers; if each step has a Sensitivity, those of the first (``_check_same``: they are the same)."""
    return measured.layers if isinstance(measured, Orthogonality) else next(iter(measured.values())).layers


def _expect(value: object, offered: tuple[object, ...], name: str) -> None:
    expect(value in offered, name, value, f"one of {', '.join(map(repr, offered))}", AllocationError)


def _offer(name: str, choices: Sequence[int], known: tuple[int, ...]) -> tuple[int, ...]:
    valid = bool(choices) and all(type(b) is int and b in known for b in choices)
    expect(valid, name, choices, f"one or more of {', '.join(map(str, known))}", AllocationError)
    return tuple(sorted(set(choices)))


def _act_demand(
    subject: Served, weight_bits: float, act_bits: float | None, choices: Sequence[int] | None, time_limit: float
) -> Demand:
    """The activation bits that ``allocate`` would use for the same arguments: fixed at 8 or 16, or bits to choose."""
    request = check_request(
        Sensitivity(subject.layers),
        weight_bits=positive("weight_bits", weight_bits),
        weight_bytes=None,
        act_bits=act_bits,
        objective="additive",
        weight_choices=None,
        act_choices=None if choices is None else _offer("act_choices", choices, ACT_BITS),
        weight_splits=None,
        act_splits=None,
        protect=(),
        tie=(),
        time_limit=time_limit,
    )
    return request.act


def _subject(measured: Orthogonality | Mapping[int, Sensitivity], steps: int | None, protect: Iterable[str]) -> Served:
    if isinstance(measured, Orthogonality):
        if steps is not None and steps != measured.steps:
            raise AllocationError(f"steps is {steps!r}, but the orthogonality was measured over {measured.steps}")
        steps, sampled = measured.steps, measured.sampled
    else:
        if not measured or steps is None:
            raise AllocationError("expected an Orthogonality, or sensitivities of one or more steps and steps=")
        sampled = sampled_steps(steps, list(measured))
        _check_same(measured)
    layers = _every_layer(measured)
    protected = protected_names(Sensitivity(layers), protect)
    if len(protected) == len(layers):
        raise AllocationError(f"protect names all {len(protected)} layers; nothing is left to allocate")
    nearest = [min(range(len(sampled)), key=lambda k: abs(sampled[k] - t)) for t in range(steps)]
    serves = tuple(tuple(t for t in range(steps) if nearest[t] == k) for k in range(len(sampled)))
    return Served(
        {n: v for n, v in layers.items() if n not in protected}, tuple(sorted(protected)), sampled, serves, steps
    )


def _check_same(measured: Mapping[int, Sensitivity]) -> None:
    (first, reference), *others = measured.items()
    for step, sensitivity in others:
        if different := set(sensitivity.layers) ^ set(reference.layers):
            raise AllocationError(
                f"layer {min(different)!r} is in the sensitivity of step {first} or {step}, not of both"
            )


@dataclass(frozen=True, slots=True)
class _Programs:
    """The two integer programs, one for each kind of bits.

    Attributes:
        measured, form, beta, decay, time_limit: as for ``allocate_steps``.
        subject: the layers and steps that get bits.
    """

    measured: Orthogonality | Mapping[int, Sensitivity]
    subject: Served
    _: KW_ONLY
    form: Form
    beta: float | None
    decay: float
    time_limit: float

    def solve(
        self,
        kind: Kind,
        budget: float | None,
        bits: tuple[int, ...],
        among: NDArray[np.bool_],
        *,
        together: bool = False,
    ) -> NDArray[np.int64]:
        """Bits [sampled, layers]: one of ``bits`` where ``among`` [sampled, layers] is true, else 16.

        ``budget``: average bits. ``together``: a layer gets the same bits at all steps.
        """
        served = np.array([len(steps) for steps in self.subject.serves], dtype=np.float64)
        sizes = np.array([layer.size(kind) for layer in self.subject.layers.values()], dtype=np.float64)
        value, form = self._value(kind, bits)
        cost = served[:, None, None] * sizes[None, :, None] * np.array(bits, dtype=np.float64)
        limit = positive(f"{kind}_bits", budget) * float((served[:, None] * sizes)[among].sum())
        shape = among.shape
        if together:
            value, cost, among = value.sum(0, keepdims=True), cost.sum(0, keepdims=True), among[:1]
        field = f"{kind}_bits"
        found = choose(form, value[among], cost[among], limit, field=field, time_limit=self.time_limit)
        chosen = np.full(among.shape, 16)
        chosen[among] = np.array(bits)[found.choice]
        return np.broadcast_to(chosen, shape)

    def _value(self, kind: Kind, bits: tuple[int, ...]) -> tuple[Array, Form]:
        """What the program minimises, [sampled, layers, bits], and the form it has."""
        if isinstance(self.measured, Orthogonality):
            return self._importances(self.measured, bits), self.form
        return _errors(self.measured, self.subject, kind, bits), "error"

    def _importances(self, measured: Orthogonality, bits: tuple[int, ...]) -> Array:
        """[sampled, layers, bits]: theta of each step and layer, times the summed weights of the steps it serves, times
        what the form minimises for an importance of 1."""
        subject, place = self.subject, {n: i for i, n in enumerate(measured.layers)}
        every = place_weights(range(subject.steps), subject.steps, self.decay)
        weights = np.array([every[list(served)].sum() for served in subject.serves])
        theta = weights[:, None] * measured.step_importance(self.beta)[:, [place[n] for n in subject.layers]]
        return theta[:, :, None] * np.array([worth(self.form, b) for b in bits])


def _errors(measured: Mapping[int, Sensitivity], subject: Served, kind: Kind, bits: tuple[int, ...]) -> Array:
    """[sampled, layers, bits]: the error power of each sampled step times the number of steps it represents."""
    tables: list[list[list[float]]] = []
    for step, served in zip(subject.sampled, subject.serves, strict=True):
        errors = additive_errors(measured[step], kind)[0]
        for name in subject.layers:
            if missing := [b for b in bits if b not in errors.get(name, {})]:
                raise AllocationError(
                    f"layer {name!r}: no {kind}_errors at {missing[0]} bits at step {step}; analyze with {missing[0]} "
                    "bits, or leave them out of the choices"
                )
        tables.append([[len(served) * errors[n][b] for b in bits] for n in subject.layers])
    return np.array(tables)
