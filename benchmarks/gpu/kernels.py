"""Products and convolutions of SDXL's UNet: ours against 16 bit and torch's int8, beside what the machine allows."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

import inductor_kernels.ops  # noqa: F401
from inductor_kernels import packing, reference, roofline, tuned
from inductor_kernels.roofline import MACHINES, Product

from ..shapes import products
from .results import failure
from .timing import captured, interleaved

OPS = torch.ops.inductor_kernels
EXTRA = [Product(16384, 8192, 4096)]  # large enough that only the tensor cores matter
SIZES = (512, 1024)
LAYERS = 16  # shapes taken of each size


def shapes() -> list[Product]:
    """A large product, then those of SDXL's UNet at batch 1, of both sizes in turn those in which most of a call is
    spent first: what a run that is cut off has measured is what matters most."""

    turns = zip(*(weighed(size)[:LAYERS] for size in SIZES), strict=True)
    return list(dict.fromkeys([*EXTRA, *(product for turn in turns for product in turn)]))


def weighed(size: int) -> list[Product]:
    """Of SDXL's UNet at batch 1, those in which most of a call is spent first."""
    found = products(size).items()
    return [p for p, _ in sorted(found, key=lambda item: -item[1] * roofline.least(item[0], MACHINES[90]))]


def limit(product: Product) -> float | None:
    """Milliseconds that no kernel for 8-bit activations and these weights can beat here; None on a GPU not listed."""
    limits = roofline.machine(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    return None if limits is None else 1e3 * roofline.least(product, limits)


def weights(shape: tuple[int, ...], bits: int, device: str):
    n = shape[0]
    if bits == 8:
        weight, zero_point = torch.randint(-127, 128, shape, dtype=torch.int8), None
    else:
        weight = packing.pack(torch.randint(0, 2**bits, shape, dtype=torch.uint8), bits)
        zero_point = torch.full((n,), 2 ** (bits - 1), dtype=torch.int8)
    total = packing.unpack_weight(weight, zero_point, bits, shape[-1]).flatten(1).sum(1, dtype=torch.int32)
    found = weight, zero_point, total, torch.rand(n) / 1000, torch.tensor(131, dtype=torch.int32), torch.randn(n).half()
    return [None if t is None else t.to(device) for t in found]


def _check(name: str, got: Tensor, expected: Tensor) -> None:
    error = (got.float() - expected.float()).abs().max().item()
    allowed = 2e-3 * expected.float().abs().max().item() + 1e-3
    if not error <= allowed:
        raise AssertionError(f"{name}: differs from the reference by {error:.3g}; at most {allowed:.3g} is rounding")


def _compiled(fn: Callable[[Tensor], Tensor], autotune: bool) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, options={"max_autotune_gemm": autotune} if autotune else None)


def _linear(m: int, n: int, k: int, device: str, autotune: bool) -> dict[str, Callable[[], object]]:
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device)
    x, w = torch.randn(m, k, device=device).half(), torch.randn(n, k, device=device).half()
    functions: dict[str, Callable[[], object]] = {"fp16": captured(lambda: F.linear(x, w))}
    x16, w16 = x.bfloat16(), w.bfloat16()
    functions["bf16"] = captured(lambda: F.linear(x16, w16))
    for bits in (8, 4, 2):
        p = weights((n, k), bits, device)
        fn = _compiled(lambda x_q, p=p, bits=bits: OPS.linear(x_q, *p, None, bits, torch.float16), autotune)
        _check(f"linear {m}x{n}x{k} w{bits}", fn(x_q)[:64], reference.linear(x_q[:64], *p, None, bits, torch.float16))
        functions[f"w{bits}a8"] = captured(functools.partial(fn, x_q))
    if device == "cuda" and m > 16 and n % 16 == 0 and k % 16 == 0:
        w8 = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        if torch.cuda.get_device_capability() >= (8, 9):
            one = torch.ones((), device=device)
            x8, wf8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn).t()
            functions["float8"] = captured(lambda: torch._scaled_mm(x8, wf8, one, one, out_dtype=torch.float16))
        # torch's int8 product alone: no scales, no bias
        functions["int_mm"] = captured(lambda: torch._int_mm(x_q, w8.t()))
    return functions


def _conv(size: int, c: int, o: int, kernel: int, device: str, autotune: bool):
    batch, pad = 1, [kernel // 2] * 2
    x_q = torch.randint(-128, 128, (batch, size, size, c), dtype=torch.int8, device=device)
    x = torch.randn(batch, c, size, size, device=device).half().to(memory_format=torch.channels_last)
    w = torch.randn(o, c, kernel, kernel, device=device).half().to(memory_format=torch.channels_last)
    functions: dict[str, Callable[[], object]] = {"fp16": captured(lambda: F.conv2d(x, w, padding=pad))}
    for bits in (8, 4, 2):
        p = weights((o, kernel, kernel, c), bits, device)
        rest = (bits, [1, 1], pad, [1, 1], 1, torch.float16)
        fn = _compiled(lambda x_q, p=p, rest=rest: OPS.conv2d(x_q, *p, *rest), autotune)
        rows = min(size, 8)
        expected = reference.conv2d(x_q[:1, : rows + kernel // 2], *p, *rest)
        _check(f"conv {c}->{o} w{bits}", fn(x_q)[:1, :rows], expected[:, :rows])
        functions[f"w{bits}a8"] = captured(functools.partial(fn, x_q))
    return functions


def _row(product: Product, functions: dict[str, Callable[[], object]], rounds: int) -> dict:
    times = interleaved(functions, rounds)
    row: dict = {"what": tuned.key(product), **{f"{name} ms": value for name, value in times.items()}}
    row |= {f"{name} vs fp16": times["fp16"] / value for name, value in times.items() if name != "fp16"}
    least = limit(product)
    if least is not None:
        four = limit(replace(product, bits=4)) or least
        row |= {"least w8a8 ms": least, "w8a8 reaches": least / times["w8a8"], "w4a8 reaches": four / times["w4a8"]}
    return row


def _functions(product: Product, *, dry: bool) -> dict[str, Callable[[], object]]:
    """What is timed for a shape: a convolution of stride 1 where it has taps."""
    device = "cpu" if dry else "cuda"
    if product.taps > 1:
        size, kernel = square(product)
        return _conv(size, product.k // product.taps, product.n, kernel, device, not dry)
    return _linear(product.m, product.n, product.k, device, not dry)


def square(product: Product) -> tuple[int, int]:
    """Height and width of a convolution's result and of its kernel."""
    return math.isqrt(product.m), math.isqrt(product.taps)


def small(product: Product) -> Product:
    """The same layer for a dry run."""
    pixels = math.isqrt(max(64, product.m // 256)) ** 2
    return replace(
        product, m=pixels, n=max(16, product.n // 16), k=max(16, product.k // product.taps // 16) * product.taps
    )


def sweep(*, dry: bool) -> Iterator[dict]:
    """One row for each shape; a shape that fails is a row that says why."""
    torch.backends.cudnn.benchmark = True  # 16-bit convolutions are tuned as well
    chosen = [small(p) for p in shapes()[1:3]] + [small(Product(4096, 320, 2880, taps=9))] if dry else shapes()
    for product in chosen:
        try:
            yield _row(product, _functions(product, dry=dry), 2 if dry else 20)
        except Exception as error:
            yield {"what": tuned.key(product)} | failure(error)
