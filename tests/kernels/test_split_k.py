"""Split-K: where reductions are shared, and which kernels add the sums."""

import re

import pytest
import torch
from torch.nn import functional as F

from inductor_kernels import testing

from .kernels import kinds_in
from .layers import codes_conv2d, image, linear, parameters, product, tokens

pytest.importorskip("triton")
N = 1280
SHARED = r"SPLIT_K : tl.constexpr = [2-8]\n"


def test_few_rows_share_a_long_reduction():
    """ff.net.2 of 256 tokens: the kernel of the residual and the next norm adds the sums of several programs."""

    def f(x_q, r, w, b, *p):
        y = product(x_q, p[:7]) + r
        return y, linear(F.layer_norm(y, (N,), w, b), p[7:])

    inputs = tokens(1, 256, 4 * N, dtype=torch.int8), tokens(1, 256, N), tokens(N), tokens(N)
    code = testing.cuda_code(f, *inputs, *parameters(N, 4 * N), *parameters(N, N))
    found = kinds_in(code)
    assert len(found) == 3 and found[0] == found[2] == "tem" and found[1] in ("red", "per")
    assert "SPLIT_K : tl.constexpr = 1\n" in code and re.search(SHARED, code)


def test_a_convolution_of_few_pixels_is_shared():
    def f(x_q, r, *p):
        return F.silu(codes_conv2d(x_q, p) + r)

    inputs = image(1, N, 16, 16, dtype=torch.int8), image(1, N, 16, 16), *parameters(N, N, 8, (3, 3))
    code = testing.cuda_code(f, *inputs)
    found = kinds_in(code)
    assert found.count("tem") == 1 and len(found) <= 3  # rows of zero points, product, sum
    assert re.search(SHARED, code)


@pytest.mark.parametrize("rows, k", [(4096, N), (1, N), (77, 2048)])
def test_others_are_not(rows, k):
    def f(x_q, r, *p):
        return product(x_q, p) + r

    code = testing.cuda_code(f, tokens(1, rows, k, dtype=torch.int8), tokens(1, rows, N), *parameters(N, k))
    assert not re.search(SHARED, code) and len(testing.kernels(code)) == 1
