"""Probes of one batch of prompts: p^2 of every layer and choice, summed over samples and steps (see BatchProbe)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..layers import find_layers
from ..models.pipelines import Sampling
from .analysis import check_covered
from .metrics import OVERFLOW
from .probe_delta import LayerDeltas
from .probe_tape import Contract, Tape, add
from .probe_trace import Trace, frozen_pipeline, trace
from .trial import signal_power
from .watch import denoiser_of, watched

Record = dict[str, float]


def signs(like: Tensor, *key: object) -> Tensor:
    """Random signs shaped as ``like``, which depend on ``key`` only, not on the device or the order of calls."""
    seed = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like.device, like.dtype)


@dataclass(slots=True)
class _Tally:
    """The p of one probe: for outputs sums of their powers, for pictures p itself, still to be summed over steps."""

    sums: dict[str, _Moments] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)

    def see_outputs(self, answers: Mapping[str, Tensor]) -> None:
        for name, p in answers.items():
            found, before = _Moments.of(p), self.sums.get(name)
            self.sums[name] = found if before is None else before + found

    def see_pictures(self, answers: Mapping[str, Tensor], count: int) -> None:
        for name, p in answers.items():
            one = p.reshape(-1, count, p.shape[1]) if p.shape[0] % count == 0 else p[None].sum(1, keepdim=True)
            self.pictures[name] = add(self.pictures.get(name), one.sum(0))


@dataclass(frozen=True, slots=True)
class _Moments:
    """Sums of p^2 and p^4 [choices], and the number of p in each sum."""

    second: Tensor
    fourth: Tensor
    rows: int

    @classmethod
    def of(cls, p: Tensor) -> _Moments:
        p = p.double()
        return cls(p.square().sum(0), p.pow(4).sum(0), len(p))

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.second + other.second, self.fourth + other.fourth, self.rows + other.rows)


class BatchProbe:
    """The trace of one batch, and probes of it.

    For random signs v over the denoiser's output, g_i = J_i^T v at the output of layer i and p = <g_i, dY_i>, the mean
    of p^2 is |J_i dY_i|^2: the squared change of the output when layer i alone changes by dY_i, to first order
    (Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix", for the matrix
    J_i dY_i dY_i^T J_i^T). Samples of a batch do not interact, so each gives a p of its own. For pictures v are signs
    over the pictures, pulled back to a step through the decoder, the scheduler and all later steps.

    Args:
        index: number of the batch, which its signs depend on.
        content: layers to judge by the pictures as well.
        budget: bytes for deltas, see Tape.

    Raises SensitivityError where a layer without deltas is called, or the denoiser's output is zero or not finite.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: list[str],
        sampling: Sampling,
        index: int,
        deltas: Mapping[str, LayerDeltas],
        content: Set[str],
        budget: int,
    ) -> None:
        self.pipe, self.deltas, self.content, self.budget = pipe, deltas, content, budget
        self.key = (sampling.seed, index)

        def refuse(name: str, *_: Any) -> None:
            check_covered([name], deltas)

        with frozen_pipeline(pipe), watched(denoiser_of(pipe), find_layers(denoiser_of(pipe)).keys() - deltas, refuse):
            self.trace: Trace = trace(pipe, prompts, sampling, pictures=bool(content))
        self._tape: tuple[int, Tape] | None = None
        self.changes: dict[int, dict[str, Tensor]] = {}
        self.order: dict[str, None] = {}
        self.power = signal_power(s.output for s in self.trace.steps)

    def run(self, probes: Sequence[int]) -> list[Record]:
        """One record per probe number: {"layer|kind|bits|output": sum of p^2, "...|output|4th": sum of p^4,
        "...|output|rows": number of p, "...|output|change": sum of squares of the layer's own change}, the same with
        "picture" for "output", "power" (of the outputs) and "pixels" (number of picture values)."""
        tallies = {k: _Tally() for k in probes}
        images, steps = self.trace.images, self.trace.steps
        pictures = {}
        if images is not None:
            pictures = {k: self.trace.picture_gradients(signs(images, *self.key, k, "picture")) for k in probes}
        with frozen_pipeline(self.pipe):
            for s in reversed(range(len(steps))):
                for k, tally in tallies.items():
                    tape = self.tape(s)
                    v = signs(steps[s].output, *self.key, k, s)
                    tally.see_outputs(tape.pull(v, set(self.deltas))[0])
                    if images is not None:
                        self._see_pictures(s, tape, tally, pictures[k])
                    self.changes.setdefault(s, tape.sink.changes)
        return [self._record(tally) for tally in tallies.values()]

    def scores(self, probe: int, contract: Contract) -> dict[str, Tensor]:
        """One probe with another ``contract``: {layer: contract(dY, g), summed over samples and steps, [choices]}."""
        totals: dict[str, Tensor] = {}
        with frozen_pipeline(self.pipe):
            for s, step in enumerate(self.trace.steps):
                v = signs(step.output, *self.key, probe, s)
                for name, values in self.tape(s).pull(v, set(self.deltas), contract)[0].items():
                    totals[name] = add(totals.get(name), values.double().sum(0, keepdim=True))
        return {name: totals[name][0] for name in self.order}

    def tape(self, step: int) -> Tape:
        """The tape of one step; only the last tape is kept."""
        if self._tape is None or self._tape[0] != step:
            self._tape = None
            s, model = self.trace.steps[step], denoiser_of(self.pipe)
            rows = s.output.shape[0]
            self._tape = (step, Tape(model, self.deltas, s.flat, s.spec, list(s.links), rows=rows, budget=self.budget))
            self.order |= dict.fromkeys(call.name for call in self._tape[1].sink.seen)
        return self._tape[1]

    def _see_pictures(self, step: int, tape: Tape, tally: _Tally, cotangents: list[Tensor]) -> None:
        """Adds one step's part of p of the pictures, and to ``cotangents`` of earlier steps the gradient through it."""
        answers, at_links = tape.pull(cotangents[step], self.content)
        tally.see_pictures(answers, self.trace.count)
        for earlier, g in enumerate(self.trace.earlier_gradients(step, at_links)):
            cotangents[earlier] = cotangents[earlier] + g

    def _record(self, tally: _Tally) -> Record:
        pixels = 0 if self.trace.images is None else self.trace.images.numel()
        record: Record = {"power": self.power, "pixels": float(pixels)}
        for name in self.order:
            self._write(record, name, "output", tally.sums[name], self.power)
            if name in tally.pictures:
                self._write(record, name, "picture", _Moments.of(tally.pictures[name]), float(pixels))
        return record

    def _write(self, record: Record, name: str, target: str, moments: _Moments, reference: float) -> None:
        changes: Any = sum(of[name] for of in self.changes.values() if name in of)
        figures = (moments.second.tolist(), moments.fourth.tolist(), changes.tolist())
        for choice, second, fourth, change in zip(self.deltas[name].choices, *figures, strict=True):
            key, finite = f"{choice.key}|{target}", math.isfinite(second) and math.isfinite(fourth)
            record[key] = second if finite else OVERFLOW * reference
            record[f"{key}|4th"] = fourth if finite else 0.0
            record[f"{key}|rows"] = float(moments.rows)
            record[f"{key}|change"] = change if finite and math.isfinite(change) else 0.0
