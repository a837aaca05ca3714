"""Input sources for measuring a model: prompts at one or more step counts, or a user's callable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..errors import CalibrationError, MixDQError
from ..models.pipelines import Sampling, check_prompts, generate
from ..progress import progress


def runs(
    pipe: Any,
    prompts: Sequence[str] | None,
    run: Callable[[], object] | None,
    *,
    title: str,
    steps: int | Sequence[int],
    **drawing: Any,
) -> tuple[Callable[[], object], dict[str, Any]]:
    """A callable that runs a model over all inputs, and its description for metadata. ``drawing``: fields of Sampling.

    Raises CalibrationError where both or neither of prompts and ``run`` are given, or ``steps`` is not a count or
    several; MixDQError where prompts are empty or a field is out of range.
    """
    check_source(pipe, prompts, run, CalibrationError)
    if run is not None:
        return run, {}
    texts = check_prompts(prompts or ())
    drawn = [Sampling(steps=count, **drawing) for count in step_counts(steps)]

    def go() -> None:
        with progress(title, len(drawn) * len(texts)) as bar:
            for sampling in drawn:
                for batch in generate(pipe, texts, sampling, "latent"):
                    bar.advance(len(batch))

    said = {"prompts": len(texts), "steps": [sampling.steps for sampling in drawn], "seed": drawn[0].seed}
    return go, said | drawn[0].size()


def check_source(
    pipe: Any, prompts: Sequence[str] | None, run: Callable[[], object] | None, error: type[MixDQError]
) -> None:
    """Raises ``error`` unless either a pipeline with prompts or ``run`` is given."""
    if run is not None and prompts is not None:
        raise error("prompts and run= are both given; run= draws inputs of its own, so pass one of them")
    if run is None and (isinstance(pipe, nn.Module) or prompts is None):
        raise error("expected a diffusers pipeline and prompts, or a module and run=")


def step_counts(steps: object) -> list[int]:
    """One number of steps, or several, as a list. Raises CalibrationError for anything else."""
    counts: list[Any] = list(steps) if isinstance(steps, Iterable) and not isinstance(steps, str) else [steps]
    if not counts or not all(type(count) is int and count >= 1 for count in counts):
        raise CalibrationError(f"steps is {steps!r}, expected a whole number of at least 1, or several as (1, 4)")
    return counts
