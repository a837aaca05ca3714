"""The error bounds: float32 results stay within them, and some come close to them."""

import pytest
import torch
from torch.nn import functional as F

from inductor_kernels import reference

from . import cases
from .budget import Bounded, known

OTHER = torch.linspace(-3, 3, 48, dtype=torch.float64)
FUNCTIONS = {
    "sum": (lambda x: x + OTHER, lambda x: x + OTHER),
    "product": (lambda x: x * OTHER, lambda x: x * OTHER),
    "square": (lambda x: x * x, lambda x: x * x),
    "layer_norm": (Bounded.layer_norm, lambda x: F.layer_norm(x, (48,))),
    "glu": (lambda x: x.glu("silu"), lambda x: reference.glu(x, x.dtype, "silu")),
}
for name in ("gelu", "gelu_tanh", "silu"):
    FUNCTIONS[name] = (lambda x, name=name: x.activated(name), reference.ACTIVATIONS[name])


@pytest.mark.parametrize("size", [1e-4, 0.1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_stay_within_the_bound(name, size):
    bounded, plain = FUNCTIONS[name]
    x = Bounded(2 * torch.randn(64, 48, dtype=torch.float64), size * torch.rand(64, 48, dtype=torch.float64))
    y, worst = bounded(x), 0.0
    for _ in range(50):
        signs = torch.randint(0, 2, x.value.shape) * 2 - 1
        found = plain(x.value + signs * x.error)
        worst = max(worst, float(((found - y.value).abs() / y.error).max()))
    assert 0.4 < worst <= 1


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_torch_computes_activations_as_exactly_as_assumed(name):
    x = torch.linspace(-20, 20, 100_001)
    known(x).activated(name).check(reference.ACTIVATIONS[name](x), torch.float32)


def test_codes_are_open_only_where_a_tie_is_near():
    y = Bounded(torch.tensor([0.124, 0.126, 0.2, 14.0]).double(), torch.full((4,), 0.01).double())
    codes = y.codes(20, cases.zero_point(10))
    assert (codes.value - codes.error).tolist() == [12, 12, 14, 255]
    assert (codes.value + codes.error).tolist() == [13, 13, 14, 255]
    codes.check(torch.tensor([12, 13, 14, 255], dtype=torch.uint8), torch.uint8)
    codes.check(torch.tensor([-115, -116, -114, 127], dtype=torch.int8), torch.int8)
    for wrong in ([11, 13, 14, 255], [12, 13, 15, 255], [12, 13, 14, 254]):
        with pytest.raises(AssertionError, match="1 of 4 are wrong"):
            codes.check(torch.tensor(wrong, dtype=torch.uint8), torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_rounding_is_within_its_unit(dtype):
    x = torch.cat([torch.randn(10_000).double(), torch.logspace(-12, 3, 10_000).double()])
    x.add_(x * 1e-9)  # what float32 does not hold
    known(x).rounded(dtype).check(x.to(dtype), dtype)
    with pytest.raises(AssertionError):
        known(x).rounded(dtype).check((x * (1 + 4 * torch.finfo(dtype).eps)).to(dtype), dtype)
