"""The kinds of kernels that a function becomes on a GPU, and one template kernel compiled for a tile, without a GPU."""

import re
from unittest import mock

import torch
from torch.nn import functional as F

from inductor_kernels import testing, tiles, tuned

from .layers import OPS, codes_conv2d, image, linear, parameters, product, quantize, tokens

INTEGER = re.compile(r"IMMA\S*S8|IGMMA\S*S8|wgmma\S*s32\.s8\.s8|mma\S*s32\.s8\.s8\.s32|tcgen05")
LENGTH = 8192  # inputs, enough for a loop: a dozen steps are unrolled completely


def kinds(fn, *inputs, arch="sm_90"):
    """Kernels in order: "tem" (template), "poi" (pointwise), "red"/"per" (reduction); "call" for operators called."""
    return kinds_in(testing.cuda_code(fn, *inputs, arch=arch))


def kinds_in(code):
    """The same for generated code."""
    called = ["call"] * code.split("async_compile.wait")[1].count("= torch.ops.inductor_kernels")
    return [name.split("_")[1] for name in testing.kernels(code)] + called


def gemm(bits):
    p = parameters(1280, LENGTH, bits)
    return lambda x, r, *p: F.gelu(product(x, p, bits)) + r, [
        tokens(4096, LENGTH, dtype=torch.int8),
        tokens(4096, 1280),
        *p,
    ]


def gemm_with_quantize(bits):
    p = parameters(128, LENGTH, bits)
    return lambda x, r, *p: F.gelu(linear(x, p, bits)) + r, [tokens(4096, LENGTH), tokens(4096, 128), *p]


def gemm_glu(bits):
    def f(x, *p):
        value, gate = product(x, p, bits).chunk(2, -1)
        return quantize(value * F.gelu(gate), p[6], p[4])

    return f, [tokens(4096, LENGTH, dtype=torch.int8), *parameters(2560, LENGTH, bits)]


def convolution(bits):
    p = parameters(320, 320, bits, (3, 3))
    inputs = image(2, 320, 64, 64, dtype=torch.int8), image(2, 320, 64, 64)
    return lambda x, r, *p: codes_conv2d(x, p, bits) + r, [*inputs, *p]


def weight_only(bits):
    p = parameters(1280, LENGTH, bits)
    return lambda x, *p: OPS.linear_weight_only(x, *p[:2], p[3], p[5], bits), [tokens(4096, LENGTH), *p]


def weight_only_float32(bits):
    p = parameters(1280, LENGTH, bits, dtype=torch.float32)
    inputs = tokens(4096, LENGTH, dtype=torch.float32)
    return lambda x, *p: OPS.linear_weight_only(x, *p[:2], p[3], p[5], bits), [inputs, *p]


KINDS = {f.__name__: (f, 1) for f in (gemm, gemm_glu, gemm_with_quantize, convolution, weight_only)}
KINDS |= {f"{f.__name__}_shared": (f, 4) for f in (gemm, convolution)}  # four programs share a reduction
OF_FEW_TILES = {"weight_only_float32": (weight_only_float32, 1)}


def compiled(kind, bits, capability, tile):
    """The KernelInfo of the template kernel of ``kind`` with ``tile``."""
    builder, shares = OF_FEW_TILES.get(kind) or KINDS[kind]
    tile = tiles.narrowed(tile, LENGTH, {"weight_only": 2, "weight_only_float32": 4}.get(kind, 1), bits)
    fn, inputs = builder(bits)
    only = mock.patch.object(tuned, "candidates", lambda *a, **k: [tile])
    with only, mock.patch.object(tuned, "way", lambda *a: tuned.Way(tile, shares)):
        code = testing.cuda_code(fn, *inputs, arch=f"sm_{capability}")
    (source,) = (source for name, source in testing.kernels(code).items() if "_tem_" in name)
    return testing.compile_for(source, f"sm_{capability}")


def uses_tensor_cores(kind, info):
    """Whether the products run on tensor cores: on the integer ones, unless activations are floating point."""
    if kind == "weight_only":
        return any("HMMA" in i or "HGMMA" in i for i in info.instructions)
    return any(INTEGER.search(i) for i in info.instructions)
