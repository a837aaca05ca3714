"""The operators' contract with torch: schema, fake implementation, compilation."""

import pytest
import torch

from inductor_kernels import reference

from . import cases
from .budget import known

OPS = torch.ops.inductor_kernels


def calls(bits):
    flat, image = cases.linear((2, 5), 6, 20, bits, rows=True), cases.conv2d(bits=bits)
    act = torch.tensor(7.0), cases.zero_point(), 255
    values = torch.randn(flat[0].shape) * 9, torch.randn(image[0].shape) * 9
    return {
        "quantize": (torch.randn(2, 6, 5).transpose(1, 2) * 9, *act),
        "quantize_linear": (values[0], *act, *flat[1:5], flat[6], bits),
        "quantize_conv2d of planes": (reference.like_planes(values[1]), *act, *image[1:5], *image[6:12]),
        "quantize_conv2d": (values[1], *act, *image[1:5], *image[6:12]),
        "linear": flat,
        "linear_post": (*flat[:7], None, *flat[8:], torch.randn(2, 5, 6), "none", None, None),
        "linear_glu": (*flat, "silu"),
        "conv2d": image,
        "linear_weight_only": cases.weight_only(flat, torch.bfloat16, conv=False),
        "conv2d_weight_only": cases.weight_only(image, torch.float32, conv=True),
    }


@pytest.mark.parametrize("bits", cases.BITS)
def test_opcheck(bits):
    for name, arguments in calls(bits).items():
        torch.library.opcheck(getattr(OPS, name.split()[0]).default, arguments)


@pytest.mark.parametrize("name", list(calls(4)))
def test_compiles_in_one_graph(name):
    arguments = calls(4)[name]
    op = getattr(OPS, name.split()[0])

    def f(*arguments):
        return torch.nn.functional.silu(op(*arguments).float()) + 1

    torch._dynamo.reset()  # f is compiled for every name
    with torch.no_grad():
        y = torch.compile(f, fullgraph=True)(*arguments)
        (known(op(*arguments)).activated("silu") + 1).check(y, torch.float32)


def test_other_devices_have_the_shape():
    for name, arguments in calls(2).items():
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
        expected = getattr(OPS, name.split()[0])(*arguments)
        y = getattr(OPS, name.split()[0])(*meta)
        assert y.shape == expected.shape and y.dtype == expected.dtype
