"""The kernel that is chosen on this machine."""

import pytest
import torch

from inductor_kernels import avx2, onednn, routes


def test_route_says_what_runs():
    assert routes.route(4) == routes.route(2) == "onednn-int8"
    assert routes.route(8, torch.full((4, 8), 64, dtype=torch.int8)) == "onednn-int8"
    expected = "onednn-int8" if onednn.int8_is_exact() else "avx2" if avx2.available() else "float32"
    assert routes.route(8) == routes.route(8, torch.full((4, 8), 127, dtype=torch.int8)) == expected
    with pytest.raises(ValueError, match="weight_bits=16"):
        routes.route(16)
