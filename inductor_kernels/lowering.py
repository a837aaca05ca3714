"""How Inductor generates code for the operators: templates on a GPU, calls everywhere else."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

from . import alike, compat, gelu, glu, post_ops, roofline, split_k, tuned
from .compat import V, ir, log
from .roofline import Product
from .templates import conv2d, gemm
from .tiles import Tile

OPS = torch.ops.inductor_kernels
ARGUMENTS = ("A", "B", "SCALE", "WSUM", "ZP", "WZP", "ROW", "BIAS")  # as templates/signature.jinja has them
GROUP_M = 8  # rows of tiles that take turns
MIN_CAPABILITY = 80  # the first architecture with asynchronous copies and bfloat16


@functools.cache
def _note(reason: str) -> None:
    log.warning("inductor_kernels: no kernel is generated (%s); the operator is called instead", reason)


def _capability(x, weight) -> int | None:
    """Compute capability to generate for, or None where the operator is left as a call."""
    device = x.get_device()
    capability = compat.triton_device(device)
    if capability is None or capability < MIN_CAPABILITY:
        if device.type != "cpu":
            _note(f"{device.type} with capability {capability}")
        return None
    if any(compat.zero(size) for size in (*x.get_size(), *weight.get_size())):
        return None
    return capability


def _generate(
    template, shape, node_inputs: dict, out_size, dtype, capability: int, prologue: bool, gate: str = "none", **options
):
    """One template node. ``shape``: (m, n, k) of the product, of one tap of a convolution; ``node_inputs``: by argument
    name, None left out."""
    m, n, k = shape
    integer = "ZP" in node_inputs
    given: dict[str, Any] = {
        name: compat.realize_inputs(node_inputs[name]) for name in ARGUMENTS if node_inputs.get(name) is not None
    }
    x = given["A"]
    taps = options.get("KH", 1) * options.get("KW", 1)
    rows, columns, depth = compat.hint(m), compat.hint(n), compat.hint(k) * taps
    product = Product(rows, columns, depth, options["BITS"], dtype.itemsize, taps)
    chosen, shares, computing = _choose(x, product, capability, integer, prologue)
    convolution = template is conv2d.template
    layout, left = ir.FixedLayout(x.get_device(), dtype, out_size), {}
    if computing:
        compat.allow_prologue(x)
    if shares > 1:
        layout = ir.FixedLayout(x.get_device(), torch.int32, [shares, *out_size[:-1], n])
        left = {name: given.pop(name) for name in split_k.LEFT if name in given}
        left["ZP"] = given["ZP"] if convolution else given.pop("ZP")  # padding reads it
    inputs = list(given.values())
    edges = convolution and integer and not computing and compat.aligned(x, 16)
    if edges:
        inputs.append(compat.zero_points(x.get_device(), x.get_dtype(), max(tile.k for tile in chosen)))
    gated = gate != "none" and shares == 1
    choices: list = []
    for tile in chosen if compat.autotunes() else chosen[:1]:
        error = template.maybe_append_choice(
            choices,
            input_nodes=tuple(inputs),
            layout=layout,
            GROUP_M=GROUP_M,
            SPLIT_K=shares,
            EVEN_K=compat.multiple_of(k, tile.k),
            INTEGER=integer,
            HAS_ZP="ZP" in given,
            ZP_NUMBER="ZP" in given and compat.passed_as_number(given["ZP"]),
            UNSIGNED=x.get_dtype() == torch.uint8,
            HAS_ROW="ROW" in given,
            HAS_BIAS="BIAS" in given,
            HAS_EDGES=edges,
            GLU=gated,
            GATE=repr(gate),
            **tile.options() | ({"PARTS": max(2, tile.parts)} if gated else {}),
            **options,
        )
        if error is not None:
            _note(str(error))
    if not choices:
        return None
    node = compat.select(template.name, choices, inputs, layout)
    return split_k.finish(node, shares, out_size, dtype, gate, **left) if left else node


def _choose(x, product: Product, capability: int, integer: bool, prologue: bool) -> tuple[list[Tile], int, bool]:
    """Tiles, the default first; how many programs share a reduction; whether the product computes its own codes."""
    candidates = functools.partial(tuned.candidates, capability, product, bytes_per_code=x.get_dtype().itemsize)
    shares = tuned.way(capability, product).shares if integer else 1
    reading = candidates(shares=shares)
    if prologue:
        expected = roofline.seconds(product, reading[0], capability, shares)
        computing = _prologue_tiles(x, product, candidates(), capability, expected)
        if computing:
            return computing, 1, True
    return reading, shares, False


def _prologue_tiles(x, product: Product, candidates: list[Tile], capability: int, expected: float) -> list[Tile]:
    """The candidates with which the product should compute its own codes, none where it should not. Work on the result
    of another product belongs to that one's epilogue, and what others read is computed for all of them. ``expected``:
    seconds when it reads codes."""
    found = compat.pointwise_work(x)
    if found is None or compat.computed_by_template(x) or compat.read_by_others():
        return []
    work, read = found
    fitting = [tile for tile in candidates if roofline.prologue_fits(tile, capability, read=read)]
    if not fitting:
        return []
    best = candidates[0] if candidates[0] in fitting else tuned.modelled(capability, product, fitting)
    pays = roofline.prologue_pays(product, best, capability, work=work, read=read, otherwise=expected)
    return sorted(fitting, key=lambda tile: tile != best) if pays else []


def _product(x, weight, lead, named: dict, dtype, bits: int, capability: int, prologue: bool, gate: str = "none"):
    """[..., K] times [N, K (packed)], leading dimensions folded into one and back. ``gate``: of ``linear_glu``."""
    k, n = x.get_size()[-1], weight.get_size()[0]
    columns = n if gate == "none" else n // 2
    m = functools.reduce(lambda a, b: a * b, lead, 1)
    flat = compat.view(compat.contiguous(x), [m, k])
    if named.get("ROW") is not None:
        named["ROW"] = compat.view(compat.contiguous(named["ROW"]), [m])
    inputs = {"A": flat, "B": compat.contiguous(weight), **named}
    node = _generate(gemm.template, (m, n, k), inputs, [m, columns], dtype, capability, prologue, gate, BITS=bits)
    return None if node is None else compat.view(node, [*lead, columns])


def _convolution(x, weight, named, dtype, bits, geometry, capability: int, prologue: bool):
    stride, padding, dilation = ([V.graph.sizevars.guard_int(v) for v in pair] for pair in geometry)
    batch, high, wide, channels = x.get_size()
    n, *kernel, last = weight.get_size()
    kernel_h, kernel_w = map(V.graph.sizevars.guard_int, kernel)
    x, weight = compat.contiguous(x), compat.contiguous(weight)
    if (kernel_h, kernel_w, *stride, *padding) == (1, 1, 1, 1, 0, 0):
        weight = compat.view(weight, [n, last])
        return _product(x, weight, [batch, high, wide], named, dtype, bits, capability, prologue)
    out_h = (high + 2 * padding[0] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    out_w = (wide + 2 * padding[1] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    return _generate(
        conv2d.template, (batch * out_h * out_w, n, channels), {"A": x, "B": weight, **named},
        [batch, out_h, out_w, n], dtype, capability, prologue, BITS=bits,
        KH=kernel_h, KW=kernel_w, STRIDE_H=stride[0], STRIDE_W=stride[1], PAD_H=padding[0],
        PAD_W=padding[1], DILATION_H=dilation[0], DILATION_W=dilation[1],
    )  # fmt: skip


def _lower(op):
    """Register a lowering that returns None where the operator is to be called."""

    def decorate(generate):
        @compat.register_lowering(op, type_promotion_kind=None)
        def lowering(x, weight, *rest):
            x = compat.computed_once(x)
            capability = _capability(x, weight)
            node = None if capability is None else generate(capability, x, weight, *rest)
            if node is None:
                node = compat.fallback(op, x, weight, *rest)
                if x.get_device().type == "cpu":
                    compat.call_python(node, f"torch.ops.{op.name().replace('::', '.')}.on_cpu")
            return node

        return lowering

    return decorate


def _integer_linear(
    capability, x, weight, wzp, weight_sum, scale, zero_point, bias, row_scale, bits, dtype, gate="none"
):
    if weight_sum is None:
        return _note("no weight_sum")
    named = {"WZP": wzp, "WSUM": weight_sum, "SCALE": scale, "ZP": zero_point, "BIAS": bias, "ROW": row_scale}
    return _product(x, weight, x.get_size()[:-1], named, dtype, bits, capability, prologue=True, gate=gate)


_lower(OPS.linear.default)(_integer_linear)
_lower(OPS.linear_glu.default)(_integer_linear)


@_lower(OPS.linear_post.default)
def _linear_post(capability, *arguments):
    """Graphs get it on a CPU only."""
    return None


@_lower(OPS.linear_weight_only.default)
def _linear_weight_only(capability, x, weight, wzp, scale, bias, bits):
    named = {"WZP": wzp, "SCALE": scale, "BIAS": bias}
    return _product(x, weight, x.get_size()[:-1], named, x.get_dtype(), bits, capability, prologue=False)


@_lower(OPS.conv2d.default)
def _conv2d(
    capability, x, weight, wzp, weight_sum, scale, zero_point, bias, bits, stride, padding, dilation, groups, dtype
):
    if groups != 1:
        return _note("grouped convolution")
    if weight_sum is None:
        return _note("no weight_sum")
    named = {"WZP": wzp, "WSUM": weight_sum, "SCALE": scale, "ZP": zero_point, "BIAS": bias}
    return _convolution(x, weight, named, dtype, bits, (stride, padding, dilation), capability, prologue=True)


@_lower(OPS.conv2d_weight_only.default)
def _conv2d_weight_only(capability, x, weight, wzp, scale, bias, bits, stride, padding, dilation, groups):
    if groups != 1:
        return _note("grouped convolution")
    named = {"WZP": wzp, "SCALE": scale, "BIAS": bias}
    geometry = (stride, padding, dilation)
    return _convolution(x, weight, named, x.get_dtype(), bits, geometry, capability, prologue=False)


alike.register()
post_ops.register()
gelu.register()
glu.register(MIN_CAPABILITY)


def _version() -> str:
    """A digest of everything that decides what code is generated."""
    here = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted((*here.glob("*.py"), *here.glob("*.json"), *here.glob("templates/*"))):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


# Torch's caches do not know the CPU either: of a folder that machines share, one with AVX2 would run code whose loops
# step by AVX-512's 16 numbers.
compat.tag_caches(f"inductor_kernels-{_version()}-{torch.backends.cpu.get_cpu_capability()}")
