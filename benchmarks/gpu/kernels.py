"""Products and convolutions of SDXL's UNet: ours against 16 bit and torch's int8, with what the machine allows."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import inductor_kernels.ops  # noqa: F401
from inductor_kernels import packing, reference

from .timing import interleaved

OPS = torch.ops.inductor_kernels
# rows, outputs, inputs: one image at 1024x1024, then the same at 512x512 where launches and weights dominate
LINEAR = [
    (4096, 640, 640), (4096, 5120, 640), (4096, 640, 2560), (1024, 1280, 1280), (1024, 10240, 1280),
    (1024, 1280, 5120), (77, 1280, 2048), (256, 1280, 1280), (256, 10240, 1280), (256, 1280, 5120),
    (4096, 1280, 1280), (16384, 8192, 4096),
]  # fmt: skip
# batch, height = width, inputs, outputs, kernel
CONV = [
    (1, 128, 320, 320, 3),
    (1, 64, 640, 640, 3),
    (1, 32, 1280, 1280, 3),
    (1, 32, 2560, 1280, 1),
    (1, 64, 320, 320, 3),
]
# operations per second (8 bit, 16 bit) and bytes per second, from the vendors' data sheets (dense)
LIMITS = {
    "H200": (1979e12, 989e12, 4.8e12), "H100": (1979e12, 989e12, 3.35e12), "A100": (624e12, 312e12, 2.0e12),
    "L40": (362e12, 181e12, 0.86e12), "4090": (660e12, 165e12, 1.01e12),
}  # fmt: skip


def _limits() -> tuple[float, float, float] | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((limits for key, limits in LIMITS.items() if key in name), None)


def roofline(m: int, n: int, k: int, bits: int) -> float | None:
    """Milliseconds that no int8 kernel for 8-bit activations, such weights and 16-bit results can beat."""
    limits = _limits()
    if limits is None:
        return None
    moved = m * k + n * k * bits / 8 + 2 * m * n
    return 1e3 * max(2 * m * n * k / limits[0], moved / limits[2])


def _weights(shape: tuple[int, ...], bits: int, device: str):
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
    functions: dict[str, Callable[[], object]] = {"fp16": lambda: F.linear(x, w)}
    for bits in (8, 4, 2):
        p = _weights((n, k), bits, device)
        fn = _compiled(lambda x_q, p=p, bits=bits: OPS.linear(x_q, *p, None, bits, torch.float16), autotune)
        _check(f"linear {m}x{n}x{k} w{bits}", fn(x_q)[:64], reference.linear(x_q[:64], *p, None, bits, torch.float16))
        functions[f"w{bits}a8"] = lambda fn=fn: fn(x_q)
    if device == "cuda" and m > 16 and n % 8 == 0 and k % 8 == 0:
        w8 = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        functions["int_mm"] = lambda: torch._int_mm(x_q, w8.t())  # torch's int8 product alone: no scales, no bias
    return functions


def _conv(batch: int, size: int, c: int, o: int, kernel: int, device: str, autotune: bool):
    pad = [kernel // 2] * 2
    x_q = torch.randint(-128, 128, (batch, size, size, c), dtype=torch.int8, device=device)
    x = torch.randn(batch, c, size, size, device=device).half().to(memory_format=torch.channels_last)
    w = torch.randn(o, c, kernel, kernel, device=device).half().to(memory_format=torch.channels_last)
    functions: dict[str, Callable[[], object]] = {"fp16": lambda: F.conv2d(x, w, padding=pad)}
    for bits in (8, 4, 2):
        p = _weights((o, kernel, kernel, c), bits, device)
        rest = (bits, [1, 1], pad, [1, 1], 1, torch.float16)
        fn = _compiled(lambda x_q, p=p, rest=rest: OPS.conv2d(x_q, *p, *rest), autotune)
        rows = min(size, 8)
        expected = reference.conv2d(x_q[:1, : rows + kernel // 2], *p, *rest)
        _check(f"conv {c}->{o} w{bits}", fn(x_q)[:1, :rows], expected[:, :rows])
        functions[f"w{bits}a8"] = lambda fn=fn: fn(x_q)
    return functions


def _row(what: str, functions, rounds: int, limit: float | None) -> dict:
    times = interleaved(functions, rounds)
    row: dict = {"what": what, **{f"{name} ms": value for name, value in times.items()}}
    row |= {f"{name} vs fp16": times["fp16"] / value for name, value in times.items() if name != "fp16"}
    return row | ({"roofline ms": limit} if limit is not None else {})


def sweep(*, dry: bool) -> Iterator[dict]:
    """One row per shape; a shape that fails is a row that says why."""
    device, rounds = ("cpu", 2) if dry else ("cuda", 30)
    shrink = 16 if dry else 1
    for m, n, k in LINEAR[:2] if dry else LINEAR:
        m, n, k = m // shrink, n // shrink, k // shrink
        what = f"linear {m}x{n}x{k}"
        try:
            yield _row(what, _linear(m, n, k, device, not dry), rounds, roofline(m, n, k, 8))
        except Exception as error:
            yield {"what": what, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    for batch, size, c, o, kernel in CONV[:2] if dry else CONV:
        size, c, o = max(8, size // shrink), c // shrink, o // shrink
        what = f"conv {kernel}x{kernel} {c}->{o} at {size}x{size}"
        try:
            limit = roofline(batch * size * size, o, c * kernel * kernel, 8)
            yield _row(what, _conv(batch, size, c, o, kernel, device, not dry), rounds, limit)
        except Exception as error:
            yield {"what": what, "error": f"{type(error).__name__}: {str(error)[:200]}"}
