"""Host time of one call of a compiled UNet before its first kernel, with and without guards on layers.

``torch.compile`` checks every weight before each call, for quantized weights every inner tensor. A GPU waits for that
at the first step of a picture, and at every step without other queued work. SDXL's 794 layers at toy width, since
widths do not matter, compiled by a backend that computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from .gpu.unet import UNGUARDED, VARIANTS, inputs
from .regional import LAYOUTS
from .turns import in_turn

NAMES = {
    "fp16": "not quantized",
    "W8A8": "W8A8, projections fused",
    "W8A8-apart": "W8A8",
    "torchao-int8": "torchao int8",
}


def nothing(graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
    """A compiler whose code returns zeros of the right shapes."""
    (outputs,) = graph.graph.output_node().args
    zeros = [torch.zeros(y.meta["val"].shape, dtype=y.meta["val"].dtype) for y in outputs]
    return make_boxed_func(lambda *_: list(zeros))


def compiled(variant: str, options: dict[str, Any]) -> Callable[[], object]:
    """A call of the UNet as one graph. Its cache is isolated, or the guards of the others would be checked too."""
    torch.manual_seed(0)
    unet = VARIANTS[variant](UNet2DConditionModel(**LAYOUTS["deep"]).eval().requires_grad_(False))
    call = inputs(unet, 8 * unet.config.sample_size, 1, "cpu", torch.float32)
    backend = aot_autograd(fw_compiler=nothing, inference_compiler=nothing)
    run = torch.compile(unet, fullgraph=True, backend=backend, options=dict(options), isolate_recompiles=True)
    return lambda: run(**call)


@pytest.fixture(scope="module")
def calls() -> dict[str, Callable[[], object]]:
    """Eight traces of a quarter of a minute to a minute each."""
    torch._dynamo.reset()
    ways: dict[str, dict[str, Any]] = {"": {}, ", layers unguarded": UNGUARDED}
    return {f"{name}{how}": compiled(variant, o) for variant, name in NAMES.items() for how, o in ways.items()}


@pytest.mark.slow
@pytest.mark.parametrize("in_a_row", [1, 10])
def test_host(benchmark: Any, calls: dict[str, Callable[[], object]], in_a_row: int) -> None:
    """A single call finds the weights and guards of others in the processor's caches, ten in a row find their own."""

    def repeated(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(in_a_row)]

    with torch.no_grad():
        found = in_turn(benchmark, {name: repeated(call) for name, call in calls.items()}, rounds=51)
    for name in NAMES.values():
        assert found[f"{name}, layers unguarded"]["ms"] < found[name]["ms"]
