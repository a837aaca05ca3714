"""What eager mode caches of an input, and when it must not."""

import gc

import pytest
import torch

from mixdq_ao.quantize import eager
from mixdq_ao.quantize.eager import is_eager, reused
from mixdq_ao.quantize.quantizer import quantize_act


class Counted:
    """Counts how often it is computed."""

    def __init__(self, x):
        self.x, self.calls = x, 0

    def __call__(self):
        self.calls += 1
        return self.x * 2


@pytest.fixture
def parameter():
    return torch.ones(3)


def test_once_for_one_input(parameter):
    x = torch.randn(4)
    compute = Counted(x)
    results = [reused(x, parameter, compute) for _ in range(3)]
    assert compute.calls == 1 and all(torch.equal(r, x * 2) for r in results)
    reused(x, torch.ones(3), compute)
    assert compute.calls == 2, "equal parameters that are not the same may differ later"


def test_again_after_a_change(parameter):
    x = torch.randn(4)
    compute = Counted(x)
    reused(x, parameter, compute)
    x.add_(1)
    assert torch.equal(reused(x, parameter, compute), x * 2) and compute.calls == 2


def test_inference_tensors_tell_nothing(parameter):
    with torch.inference_mode():
        x = torch.randn(4)
        compute = Counted(x)
        reused(x, parameter, compute)
        reused(x, parameter, compute)
    assert compute.calls == 2


def test_nothing_outlives_the_input(parameter):
    gc.collect()
    before = len(eager._known)
    x = torch.randn(4)
    reused(x, parameter, Counted(x))
    assert len(eager._known) == before + 1
    del x
    gc.collect()
    assert len(eager._known) == before


def test_a_traced_graph_holds_the_operators(parameter):
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(x):
        reused(x, parameter, lambda: x * 2)
        return reused(x, parameter, lambda: x * 2)

    x = torch.randn(4)
    f(x)  # known already
    graph = make_fx(f)(x)
    assert torch.equal(graph(x + 1), (x + 1) * 2)
    traced = torch.jit.trace(f, x)
    assert torch.equal(traced(x + 1), (x + 1) * 2)
    assert torch.equal(torch.compile(f, backend="eager", fullgraph=True)(x + 1), (x + 1) * 2)


def test_a_traced_graph_quantizes_with_plain_operators():
    """Only plain operators fuse. torch 2.11 traces a weight's products with is_compiling() false."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(4, 8)
    act = torch.tensor(20.0), torch.tensor(100, dtype=torch.int32), 255
    graph = make_fx(lambda x: quantize_act(x, *act))(x)
    assert not any("inductor_kernels" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(x), quantize_act(x, *act))


def test_only_plain_tensors_on_a_cpu():
    x = torch.randn(2)
    assert is_eager(x)
    assert not is_eager(x.to("meta")) and not is_eager(torch.nn.Parameter(x))
