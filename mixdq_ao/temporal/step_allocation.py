"""Bits per layer and denoising step, as levels of a TemporalPlan: MPQ-Diff (arXiv 2412.00144) within a run.

What can differ from step to step is what ``runtime.prepare`` can switch:

- Activation bits of every layer, freely.
- Weight bits of every layer, among the widths that are held. Storage "nested" holds every weight once, at 8 bits, and
  reads all of it or its 4-bit half: 4 and 8 bits, in the bytes of one 8-bit model, whatever the plan. Storage "own"
  holds a copy for each width that a layer has at some step: 2, 4 and 8 bits, in the bytes of all of them.

So bits that differ between steps save memory traffic and time, not memory; the budget is the mean over the steps.
Where memory is what is short, ``weights="per layer"`` keeps a layer's weight bits the same at all steps and lets only
activations differ.

Each sampled step makes a level, which serves the steps nearest to it; each level is one compiled graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import AllocationError
from ..layer_plan import ACT_BITS, WEIGHT_BITS
from ..search.additive import additive_errors
from ..search.highs import Array
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
    """A plan of bits per layer and step; no ranges yet (see ``TemporalPlan.with_calibration``).

    Args:
        measured: importances from ``orthogonality``; or {step: Sensitivity} with the errors each layer makes at sampled
            steps (``step_probe.probe_steps`` estimates them), whose sum is minimised (``form``, beta and decay have no
            say then).
        steps: of the run; with an Orthogonality its own.
        weight_bits, act_bits: average over weights or input elements and over the steps of the run. act_bits None, or
            8 and more with the default choices: 8; 16: activations kept. Where a weight gets 16, its activation is
            kept as well (no integer product takes the two) and not counted in the average.
        form: "linear", "integer" or "error", as for ``allocate_orthogonal``: of theta_i at each sampled step, times
            exp(decay p) of the steps it serves.
        beta, decay: see ``Orthogonality.step_importance`` and ``step_weights``.
        weights: "per step", or "per layer": weight bits are the same at all steps.
        storage: what ``prepare`` will be given; says which weight bits there are by default (nested 4 and 8, own 2, 4
        and 8).
        weight_choices, act_choices: bits offered; activations {4, 8} by default.
        protect: layers kept at 16 bits.
        time_limit: seconds for each of the two programs.

    Levels are named after the steps they serve ("0-1"), most weight bits first, and cost their mean weight bits / 16
    (no costs where two levels come out equal). Equal levels are one.

    Raises AllocationError: an argument is wrong, or no plan within a budget. SensitivityError: beta, decay or steps.
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
    options: dict[str, Any] = {"form": form, "beta": beta, "decay": decay, "time_limit": time_limit}
    demand = _act_demand(subject, weight_bits, act_bits, act_choices, time_limit)
    every = np.full((len(subject.sampled), len(subject.layers)), True)
    together = weights == "per layer"
    found = _solve(measured, subject, "weight", weight_bits, choices, every, together=together, **options)
    quantized, acts = found < 16, np.full(every.shape, 16)
    if demand.fixed is not None:
        acts[quantized] = demand.fixed
    elif quantized.any():
        offered = demand.choices["content"]
        acts = _solve(measured, subject, "act", act_bits, offered, quantized, together=False, **options)
    objective = f"importance, form {form}" if isinstance(measured, Orthogonality) else "measured errors"
    metadata = {"source": "allocate_steps", "objective": objective, "weights": weights, "storage": storage}
    return to_levels(subject, found, acts, metadata)


def _every_layer(measured: Orthogonality | Mapping[int, Sensitivity]) -> Mapping[str, LayerSensitivity]:
    """All layers, those of the first step where each step has its own."""
    return measured.layers if isinstance(measured, Orthogonality) else next(iter(measured.values())).layers


def _expect(value: object, offered: tuple[object, ...], name: str) -> None:
    if value not in offered:
        raise AllocationError(f"{name} is {value!r}, expected one of {', '.join(map(repr, offered))}")


def _offer(name: str, choices: Sequence[int], known: tuple[int, ...]) -> tuple[int, ...]:
    if not choices or not all(type(b) is int and b in known for b in choices):
        raise AllocationError(f"{name} is {choices!r}, expected one or more of {', '.join(map(str, known))}")
    return tuple(sorted(set(choices)))


def _act_demand(
    subject: Served, weight_bits: float, act_bits: float | None, choices: Sequence[int] | None, time_limit: float
) -> Demand:
    """What ``allocate`` makes of the same arguments: 8, 16, or bits to choose."""
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


def _solve(
    measured: Orthogonality | Mapping[int, Sensitivity],
    subject: Served,
    kind: Kind,
    budget: float | None,
    bits: tuple[int, ...],
    among: NDArray[np.bool_],
    *,
    together: bool,
    form: Form,
    beta: float | None,
    decay: float,
    time_limit: float,
) -> NDArray[np.int64]:
    """[sampled, layers] bits of the layers ``among``, 16 of the others."""
    counts = np.array([len(s) for s in subject.serves], dtype=np.float64)
    sizes = np.array([layer.size(kind) for layer in subject.layers.values()], dtype=np.float64)
    if isinstance(measured, Orthogonality):
        value = _importances(measured, subject, bits, form, beta, decay)
    else:
        value, form = _errors(measured, subject, kind, bits), "error"
    cost = counts[:, None, None] * sizes[None, :, None] * np.array(bits, dtype=np.float64)
    limit = positive(f"{kind}_bits", budget) * float((counts[:, None] * sizes)[among].sum())
    shape = among.shape
    if together:
        value, cost, among = value.sum(0, keepdims=True), cost.sum(0, keepdims=True), among[:1]
    found = choose(form, value[among], cost[among], limit, field=f"{kind}_bits", time_limit=time_limit)
    chosen = np.full(among.shape, 16)
    chosen[among] = np.array(bits)[found.choice]
    return np.broadcast_to(chosen, shape)


def _importances(
    measured: Orthogonality, subject: Served, bits: tuple[int, ...], form: Form, beta: float | None, decay: float
) -> Array:
    """[sampled, layers, bits]."""
    place = {n: i for i, n in enumerate(measured.layers)}
    every = place_weights(range(subject.steps), subject.steps, decay)
    weights = np.array([every[list(served)].sum() for served in subject.serves])
    theta = weights[:, None] * measured.step_importance(beta)[:, [place[n] for n in subject.layers]]
    return theta[:, :, None] * np.array([worth(form, b) for b in bits])


def _errors(measured: Mapping[int, Sensitivity], subject: Served, kind: Kind, bits: tuple[int, ...]) -> Array:
    """[sampled, layers, bits]: each step's error power times the steps it stands for."""
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
