"""Models that are compiled, or that hand their layers the input by name, give what they give otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixdq_ao import LayerPlan, MixDQError, Plan, analyze, calibrate, input_moments, layer_latencies, orthogonality
from mixdq_ao.search.prediction import measured_errors
from mixdq_ao.search.watch import eager, watched

from .test_probe import PROMPTS, Toy, quality


def as_it_is(pipe: Any) -> None:
    pass


def by_name(pipe: Any) -> None:
    def forward(self: Any, sample: Tensor, timestep: int = 0) -> tuple[Tensor]:
        return (self.third(input=self.second(input=self.first(input=sample))),)

    pipe.unet.forward = partial(forward, pipe.unet)


def wrapped(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def in_place(pipe: Any) -> None:
    pipe.unet.compile(backend="eager")


def everything(change: Callable[[Any], None]) -> dict[str, Any]:
    """What the search finds out about a pipeline whose denoiser has been changed, and called."""
    pipe, x = Toy(), torch.linspace(-1, 1, 3 * 5 * 6).reshape(3, 5, 6)
    change(pipe)
    run = partial(pipe.unet, x)
    run()
    calibration = calibrate(pipe, PROMPTS, smoothing=0.5)
    options: dict[str, Any] = {"calibration": calibration, "weight_bits": (4,), "act_bits": (8,), "rule": quality}
    plan = Plan({"second": LayerPlan(weight_bits=4, act_bits=8)}).with_calibration(calibration)
    return {
        "calibration": calibration.to_json(),
        "of a module": calibrate(pipe.unet, run=run).to_json(),
        "one at a time": analyze(pipe, PROMPTS, **options).to_json(),
        "probe": analyze(pipe, PROMPTS, method="probe", probes=2, **options).to_json(),
        "moments": input_moments(pipe, PROMPTS, calibration=calibration).fingerprint,
        "orthogonality": orthogonality(pipe, PROMPTS, calibration=calibration).to_json(),
        "latencies": set(layer_latencies(pipe.unet, calibration, run, weight_bits=(8,), rounds=1)),
        "errors": measured_errors(pipe, [plan], PROMPTS),
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return everything(as_it_is)


@pytest.mark.parametrize("change", [by_name, wrapped, in_place])
def test_the_search_finds_the_same(expected, change):
    found = everything(change)
    assert list(expected["calibration"]["layers"]) == ["first", "second", "third"]
    for name, value in expected.items():
        assert found[name] == value, name


def test_an_input_that_is_neither_first_nor_named_input():
    class Odd(nn.Linear):
        def forward(self, *, rows: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(rows)

    model = nn.ModuleDict({"odd": Odd(2, 2)})
    with pytest.raises(MixDQError, match="layer 'odd': is called with rows, expected its input first, or as input="):
        calibrate(model, run=lambda: model["odd"](rows=torch.ones(1, 2)))
    assert not model["odd"]._forward_hooks


def test_hooks_and_eagerness_end_with_an_error():
    layer, compiled = nn.Linear(2, 2), []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    run = torch.compile(lambda x: layer(x) + 1, backend=backend)
    with pytest.raises(ZeroDivisionError), watched(nn.Sequential(layer), ["0"], lambda *call: 1 / 0):
        run(torch.ones(1, 2))
    assert not layer._forward_hooks and not compiled
    run(torch.ones(1, 2))
    assert compiled


def test_eagerness_ends_with_the_last_of_overlapping_threads():
    first, second, ended, compiled = Event(), Event(), Event(), []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    def early() -> None:
        with eager():
            first.set()
            second.wait(10)
        ended.set()

    def late() -> None:
        first.wait(10)
        with eager():
            second.set()
            ended.wait(10)
            torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))

    threads = [Thread(target=target) for target in (early, late)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not compiled
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert compiled
