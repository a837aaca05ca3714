"""Equal nodes of a graph with quantized layers are merged where that does not change results."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_kernels import alike, reference, testing

from . import cases
from .budget import known
from .kernels import kinds_in
from .layers import OPS, linear, parameters, tokens

X = torch.randn(4, 16)
LAYER = cases.linear((4,), 16, 16, 8)
INVERSE = torch.tensor(20.0)


def graph_of(f):
    """The traced graph of ``f(x, inverse, *p)``, with the arguments of :func:`layer`."""
    return make_fx(f, tracing_mode="symbolic")(X, INVERSE, *LAYER[1:7]).graph


def count(graph, name):
    return sum(name in str(node.target) for node in graph.nodes if node.op == "call_function")


def layer(x, inverse=INVERSE, *p):
    p = p or LAYER[1:7]
    return OPS.linear(reference.quantize(x, inverse, p[4], 255), *p, *LAYER[7:])


def test_equal_chains_become_one():
    graph = graph_of(lambda x, *p: layer(x * 2.0, *p) + layer(x * 2.0, *p).relu())
    assert alike.merge(graph) > 0
    assert (count(graph, "aten.round"), count(graph, "inductor_kernels.linear")) == (1, 2)
    graph.lint()


@pytest.mark.parametrize(
    ("a", "b"),
    [(lambda x: x * 2.0, lambda x: x * 3.0), (lambda x: x + 1, lambda x: x + 1.0), (torch.rand_like, torch.rand_like)]
    + [(lambda x: x.nonzero().sum(), lambda x: x.nonzero().sum())],
    ids=["arguments", "types of arguments", "random", "sizes"],
)
def test_what_differs_stays(a, b):
    graph = graph_of(lambda x, *p: (layer(x, *p), a(x) - b(x)))
    before = len(graph.nodes)
    assert alike.merge(graph) == 0 and len(graph.nodes) == before


def test_graphs_of_others_stay():
    graph = graph_of(lambda x, *p: x.sin() * x.sin())
    assert alike.merge(graph) == 0 and count(graph, "aten.sin") == 2


def test_what_a_caller_gets_is_his_alone():
    def f(x):
        return x.abs(), x.abs().view(16, 4), x.abs().view(64), layer(x), *x.abs().chunk(2), *x.abs().chunk(2)

    with torch.no_grad():
        first, second, third, _, half, _, same, _ = torch.compile(f, fullgraph=True)(X)
    half.zero_()
    assert torch.equal(same, X.abs().chunk(2)[0])
    first.zero_()
    assert torch.equal(second, X.abs().view(16, 4))
    second.zero_()
    assert torch.equal(third, X.abs().view(64))


def test_layers_with_one_input_quantize_it_once_on_a_cpu():
    def f(x):
        return layer(x) * layer(x) + layer(x)

    with torch.no_grad():
        y, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), X)
    exact = cases.exact("linear", (known(X).codes(INVERSE, LAYER[5]), *LAYER[1:]))
    (exact * exact + exact).check(y, torch.float32)
    assert (
        len(re.findall(r"empty_strided_cpu\(.*torch\.uint8", code)) == 1
    )  # Inductor alone writes the codes three times


def test_and_write_it_once_on_a_gpu():
    pytest.importorskip("triton")

    def f(x, *p):
        return linear(x, p[:7]), linear(x, (*p[7:11], p[4], p[12], p[6]))

    code = testing.cuda_code(f, tokens(2, 1024, 640), *(parameters(640, 640) * 2))
    (quantizing,) = (source for name, source in testing.kernels(code).items() if "_poi_" in name)
    assert kinds_in(code).count("tem") == 1 and code.count(".run(") == 3 and quantizing.count("tl.store") == 1
