"""The sigmoid form of tanh GELU behind a product: its error, and where it replaces tanh and where not."""

import functools

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from inductor_kernels import gelu

from . import cases
from .budget import known, unit

OPS = torch.ops.inductor_kernels
GELU = functools.partial(F.gelu, approximate="tanh")


def test_as_exact_as_the_definition():
    """Errors of a few float32 units of the argument, for arguments up to where one of the two factors is 0 or 1."""
    y = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([-1e30, -100, 0, 100, 1e30])])
    exact = GELU(y.double())
    assert bool(((gelu._with_sigmoid(y) - exact).abs() <= 4 * unit(torch.float32) * y.abs()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_graph(dtype):
    """Behind a product tanh is replaced; elsewhere in a model it stays."""
    arguments, other = cases.linear((20,), 24, 32, 8, out=dtype), torch.randn(4, 16, dtype=dtype)

    def f(other):
        return GELU(OPS.linear(*arguments)), GELU(other)

    with torch.no_grad():
        found, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), other)
    of_product = cases.exact("linear", arguments).rounded(dtype)
    for y, x in zip(found, (of_product, known(other)), strict=True):
        x.activated("gelu_tanh").check(y, dtype)
    assert code.count(".tanh()") == code.count(".exp()") == 1
