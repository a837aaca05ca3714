"""Small functions around the operators, as in a quantized model, and arguments of given shapes for them."""

import torch

from inductor_kernels import packing

OPS = torch.ops.inductor_kernels


def quantize(x, scale, zero_point):
    """The int8 codes of a quantized layer's input, by plain operators."""
    return (torch.round(x.float() * scale) + (zero_point - 128)).clamp(-128, 127).to(torch.int8)


def parameters(n, k, bits=8, kernel=(), dtype=torch.float16):
    """(weight, its zero point, weight_sum, scale, zero_point, bias, activation scale)."""
    last = k if bits == 8 else packing.packed_length(k, bits)
    return (
        torch.zeros(n, *kernel, last, dtype=torch.int8 if bits == 8 else torch.uint8),
        None if bits == 8 else torch.zeros(n, dtype=torch.int8),
        torch.zeros(n, dtype=torch.int32),
        torch.zeros(n),
        torch.zeros((), dtype=torch.int32),
        torch.zeros(n, dtype=dtype),
        torch.zeros(()),
    )


def product(x_q, p, bits=8, out=torch.float16, rows=None):
    return OPS.linear(x_q, *p[:6], rows, bits, out)


def linear(x, p, bits=8, out=torch.float16):
    return product(quantize(x, p[6], p[4]), p, bits, out)


def codes_conv2d(x_q, p, bits=8, stride=1, padding=1, out=torch.float16):
    """``conv2d`` of NCHW codes in channels-last memory; returns the same layout."""
    x_q = x_q.permute(0, 2, 3, 1)
    y = OPS.conv2d(x_q, *p[:6], bits, [stride] * 2, [padding] * 2, [1, 1], 1, out)
    return y.permute(0, 3, 1, 2)


def conv2d(x, p, bits=8, stride=1, padding=1, out=torch.float16):
    """A quantized convolution as a module computes it, NCHW in and out."""
    return codes_conv2d(quantize(x, p[6], p[4]), p, bits, stride, padding, out)


def image(*shape, dtype=torch.float16):
    return torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)


def tokens(*shape, dtype=torch.float16):
    return torch.zeros(shape, dtype=dtype)
