"""Inductor lowerings of the operators: Triton templates on a GPU, calls of the operators elsewhere."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from . import alike, compat, gelu, glu, post_ops, roofline, split_k, tuned
from .compat import Node, Operator, Size, V, ir, log
from .packing import run_length
from .roofline import Product
from .templates import conv2d, gemm
from .tiles import TILES, Tile

OPS = torch.ops.inductor_kernels
ARGUMENTS = ("A", "B", "SCALE", "WSUM", "ZP", "WZP", "ROW", "BIAS")  # in the order of templates/signature.jinja
GROUP_M = 8  # rows of tiles whose programs run next to each other, to share operands in the cache
MIN_CAPABILITY = min(TILES)  # sm_80: the first architecture with asynchronous copies and bfloat16


@functools.cache
def _note(reason: str) -> None:
    """Warn, once per reason."""
    log.warning("inductor_kernels: no kernel is generated (%s); the operator is called instead", reason)


def _capability(x: Node, weight: Node) -> int | None:
    """The compute capability to generate code for, None where the operator remains a call."""
    device = x.get_device_or_error()
    capability = compat.triton_device(device)
    if capability is None or capability < MIN_CAPABILITY:
        if device.type != "cpu":
            _note(f"{device.type} with capability {capability}")
        return None
    if any(compat.zero(size) for size in (*x.get_size(), *weight.get_size())):
        return None
    return capability


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """A product that a template is to compute.

    m, n, k: rows, outputs, and inputs per tap of a convolution. operands: by argument name. gate: the activation of
    ``linear_glu``. window: the template's options for the geometry of a convolution; empty for a matrix product.
    """

    template: compat.TritonTemplate
    capability: int
    m: Size
    n: Size
    k: Size
    operands: Mapping[str, Node]
    out_size: Sequence[Size]
    dtype: torch.dtype
    bits: int
    gate: str = "none"
    window: Mapping[str, int] = field(default_factory=dict)

    @property
    def integer(self) -> bool:
        """Whether activations are codes; else they are floating point."""
        return "ZP" in self.operands

    def product(self) -> Product:
        """The product in numbers; dynamic sizes have the values seen when compiling."""
        taps = self.window.get("KH", 1) * self.window.get("KW", 1)
        rows, columns, depth = compat.hint(self.m), compat.hint(self.n), compat.hint(self.k) * taps
        finish = roofline.FINISH if self.gate == "none" else roofline.FINISH_GATED
        return Product(rows, columns, depth, self.bits, self.dtype.itemsize, taps, finish)


class _Choice(NamedTuple):
    """Candidate tiles, the default first; how many programs share a reduction; whether the quantize becomes the
    template's prologue, so that the product computes its own codes."""

    tiles: list[Tile]
    shares: int
    computing: bool


def _generate(request: _Request) -> Node | None:
    """A template's output node, with the sum over the shares of its reduction where it is shared. None where the
    template accepts no tile."""
    template, operands = request.template, request.operands
    given: dict[str, Any] = {name: compat.realize_inputs(operands[name]) for name in ARGUMENTS if name in operands}
    x, convolution = given["A"], bool(request.window)
    chosen = _choose(x, request)
    if chosen.computing:
        compat.allow_prologue(x)
    if chosen.shares == 1:
        layout, left = ir.FixedLayout(x.get_device_or_error(), request.dtype, list(request.out_size)), {}
    else:
        size = [chosen.shares, *request.out_size[:-1], request.n]
        layout = ir.FixedLayout(x.get_device_or_error(), torch.int32, size)
        left = {name: given.pop(name) for name in split_k.LEFT if name in given}
        left["ZP"] = given["ZP"] if convolution else given.pop("ZP")  # a convolution's padding reads it
    inputs = list(given.values())
    edges = convolution and request.integer and not chosen.computing and compat.aligned(x, 16)
    if edges:
        inputs.append(compat.zero_points(x.get_device_or_error(), x.get_dtype(), max(tile.k for tile in chosen.tiles)))
    choices: list[Any] = []
    for tile in chosen.tiles if compat.autotunes() else chosen.tiles[:1]:
        options = _options(request, tile, chosen.shares, given) | {"HAS_EDGES": edges}
        error = template.maybe_append_choice(choices, input_nodes=tuple(inputs), layout=layout, **options)
        if error is not None:
            _note(str(error))
    if not choices:
        return None
    node = compat.select(template.name, choices, inputs, layout)
    return split_k.finish(node, chosen.shares, request.out_size, request.dtype, request.gate, **left) if left else node


def _options(request: _Request, tile: Tile, shares: int, given: Mapping[str, Node]) -> dict[str, Any]:
    """The template's options for a tile. ``given``: the arguments of the kernel."""
    gated = request.gate != "none" and shares == 1
    return {
        **tile.options(),
        **({"PARTS": max(2, tile.parts)} if gated else {}),
        **request.window,
        "BITS": request.bits,
        "RUN": run_length(V.graph.sizevars.guard_int(request.k), request.bits) if request.bits < 8 else 0,
        "GROUP_M": GROUP_M,
        "SPLIT_K": shares,
        "EVEN_K": compat.multiple_of(request.k, tile.k),
        "INTEGER": request.integer,
        "HAS_ZP": "ZP" in given,
        "ZP_NUMBER": "ZP" in given and compat.passed_as_number(given["ZP"]),
        "UNSIGNED": given["A"].get_dtype() == torch.uint8,
        "HAS_ROW": "ROW" in given,
        "HAS_BIAS": "BIAS" in given,
        "GLU": gated,
        "GATE": repr(request.gate),
    }


def _choose(x: Node, request: _Request) -> _Choice:
    product, capability = request.product(), request.capability
    candidates = functools.partial(tuned.candidates, capability, product, bytes_per_code=x.get_dtype().itemsize)
    shares = tuned.way(capability, product).shares if request.integer else 1
    reading = candidates(shares=shares)
    if request.integer:
        expected = roofline.seconds(product, reading[0], capability, shares)
        computing = _prologue_tiles(x, product, candidates(), capability, expected)
        if computing:
            return _Choice(computing, 1, True)
    return _Choice(reading, shares, False)


def _prologue_tiles(x: Node, product: Product, candidates: list[Tile], capability: int, expected: float) -> list[Tile]:
    """The candidates with which the product should compute its own codes, the best first; empty where it should not.
    Pointwise work on the result of another product belongs to the epilogue of that product, and codes that other nodes
    read are computed once for all. ``expected``: seconds for the product when it reads codes."""
    found = compat.pointwise_work(x)
    if found is None or compat.computed_by_template(x) or compat.read_by_others():
        return []
    work, read = found
    fitting = [tile for tile in candidates if roofline.prologue_fits(tile, capability, read=read)]
    if not fitting:
        return []
    best = min(fitting, key=lambda tile: roofline.prologue_seconds(product, tile, capability, work=work, read=read))
    pays = roofline.prologue_pays(product, best, capability, work=work, read=read, otherwise=expected)
    return sorted(fitting, key=lambda tile: tile != best) if pays else []


def _product(
    capability: int, x: Node, weight: Node, operands: Mapping[str, Node], dtype: torch.dtype, bits: int,
    gate: str = "none",
) -> Node | None:  # fmt: skip
    """[..., K] times [N, K (packed)]; the leading dimensions are flattened and restored."""
    *lead, k = x.get_size()
    n = weight.get_size()[0]
    columns = n if gate == "none" else n // 2
    m = functools.reduce(lambda a, b: a * b, lead, 1)
    operands = {**operands, "A": compat.view(compat.contiguous(x), [m, k]), "B": compat.contiguous(weight)}
    if "ROW" in operands:
        operands["ROW"] = compat.view(compat.contiguous(operands["ROW"]), [m])
    node = _generate(
        _Request(
            template=gemm.template, capability=capability, m=m, n=n, k=k, operands=operands, out_size=[m, columns],
            dtype=dtype, bits=bits, gate=gate,
        )
    )  # fmt: skip
    return None if node is None else compat.view(node, [*lead, columns])


def _convolution(
    capability: int, x: Node, weight: Node, operands: Mapping[str, Node], dtype: torch.dtype, bits: int,
    geometry: Sequence[Sequence[Size]],
) -> Node | None:  # fmt: skip
    """[B, H, W, C] with [N, kh, kw, C (packed)]; a 1x1 kernel makes it a matrix product. ``geometry``: stride, padding
    and dilation."""
    stride, padding, dilation = ([V.graph.sizevars.guard_int(v) for v in pair] for pair in geometry)
    batch, high, wide, channels = x.get_size()
    n, *kernel, last = weight.get_size()
    kernel_h, kernel_w = map(V.graph.sizevars.guard_int, kernel)
    x, weight = compat.contiguous(x), compat.contiguous(weight)
    if (kernel_h, kernel_w, *stride, *padding) == (1, 1, 1, 1, 0, 0):
        return _product(capability, x, compat.view(weight, [n, last]), operands, dtype, bits)
    out_h = compat.floor_div(high + 2 * padding[0] - dilation[0] * (kernel_h - 1) - 1, stride[0]) + 1
    out_w = compat.floor_div(wide + 2 * padding[1] - dilation[1] * (kernel_w - 1) - 1, stride[1]) + 1
    window = {
        "KH": kernel_h, "KW": kernel_w, "STRIDE_H": stride[0], "STRIDE_W": stride[1], "PAD_H": padding[0],
        "PAD_W": padding[1], "DILATION_H": dilation[0], "DILATION_W": dilation[1],
    }  # fmt: skip
    return _generate(
        _Request(
            template=conv2d.template, capability=capability, m=batch * out_h * out_w, n=n, k=channels,
            operands={**operands, "A": x, "B": weight}, out_size=[batch, out_h, out_w, n], dtype=dtype, bits=bits,
            window=window,
        )
    )  # fmt: skip


Lowering: TypeAlias = Callable[..., Node | None]


def _lower(op: Operator) -> Callable[[Lowering], Lowering]:
    """Register a lowering. It gets the capability before the operator's arguments, and returns None where the operator
    is to be called."""

    def decorate(generate: Lowering) -> Lowering:
        @compat.register_lowering(op, type_promotion_kind=None)
        def lowering(x: Node, weight: Node, *rest: Any) -> Any:
            x = compat.computed_once(x)
            capability = _capability(x, weight)
            node = None if capability is None else generate(capability, x, weight, *rest)
            if node is None:
                node = compat.fallback(op, x, weight, *rest)
                if x.get_device_or_error().type == "cpu":
                    compat.call_python(node, f"torch.ops.{op.name().replace('::', '.')}.on_cpu")
            return node

        return generate

    return decorate


def _given(**operands: Node | None) -> dict[str, Node]:
    return {name: operand for name, operand in operands.items() if operand is not None}


@_lower(OPS.linear.default)
@_lower(OPS.linear_glu.default)
def _integer_linear(
    capability: int, x: Node, weight: Node, wzp: Node | None, weight_sum: Node | None, scale: Node, zero_point: Node,
    bias: Node | None, row_scale: Node | None, bits: int, dtype: torch.dtype, gate: str = "none",
) -> Node | None:  # fmt: skip
    if weight_sum is None:
        return _note("no weight_sum")
    operands = _given(WZP=wzp, WSUM=weight_sum, SCALE=scale, ZP=zero_point, BIAS=bias, ROW=row_scale)
    return _product(capability, x, weight, operands, dtype, bits, gate)


@_lower(OPS.linear_post.default)
def _linear_post(capability: int, *arguments: Any) -> None:
    """Always a call: only graphs for a CPU hold this operator."""


@_lower(OPS.linear_weight_only.default)
def _linear_weight_only(
    capability: int, x: Node, weight: Node, wzp: Node | None, scale: Node, bias: Node | None, bits: int
) -> Node | None:
    return _product(capability, x, weight, _given(WZP=wzp, SCALE=scale, BIAS=bias), x.get_dtype(), bits)


@_lower(OPS.conv2d.default)
def _conv2d(
    capability: int, x: Node, weight: Node, wzp: Node | None, weight_sum: Node | None, scale: Node, zero_point: Node,
    bias: Node | None, bits: int, stride: Sequence[Size], padding: Sequence[Size], dilation: Sequence[Size],
    groups: int, dtype: torch.dtype,
) -> Node | None:  # fmt: skip
    if groups != 1:
        return _note("grouped convolution")
    if weight_sum is None:
        return _note("no weight_sum")
    operands = _given(WZP=wzp, WSUM=weight_sum, SCALE=scale, ZP=zero_point, BIAS=bias)
    return _convolution(capability, x, weight, operands, dtype, bits, (stride, padding, dilation))


@_lower(OPS.conv2d_weight_only.default)
def _conv2d_weight_only(
    capability: int, x: Node, weight: Node, wzp: Node | None, scale: Node, bias: Node | None, bits: int,
    stride: Sequence[Size], padding: Sequence[Size], dilation: Sequence[Size], groups: int,
) -> Node | None:  # fmt: skip
    if groups != 1:
        return _note("grouped convolution")
    operands = _given(WZP=wzp, SCALE=scale, BIAS=bias)
    return _convolution(capability, x, weight, operands, x.get_dtype(), bits, (stride, padding, dilation))


alike.register()
post_ops.register()
gelu.register()
glu.register(MIN_CAPABILITY)


def _version() -> str:
    """A digest of all files that decide which code is generated."""
    here = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted((*here.glob("*.py"), *here.glob("*.json"), *here.glob("templates/*"))):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


# The keys of Inductor's caches do not contain the CPU's capability either: in a cache folder that machines share, one
# with AVX2 would run code whose loops step by the 16 numbers of AVX-512.
compat.tag_caches(f"inductor_kernels-{_version()}-{torch.backends.cpu.get_cpu_capability()}")
