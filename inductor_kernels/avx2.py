"""The C kernel for x86 without VNNI (``avx2.c``), built once with the machine's compiler, where there is one.

INDUCTOR_KERNELS_AVX2=0 turns it off; the library is kept under XDG_CACHE_HOME.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger("inductor_kernels")
SOURCE = Path(__file__).with_name("avx2.c")
FLAGS = ("-O3", "-mavx2", "-mfma", "-fopenmp", "-shared", "-fPIC", "-ffp-contract=off")
COLUMNS = 16  # outputs per panel
_FIELDS = (
    "height width channels kernel_h kernel_w stride_h stride_w pad_h pad_w dilation_h dilation_w out_h out_w columns"
).split()
POINTWISE = (1, 1, 1, 1, 0, 0, 1, 1)  # a 1x1 kernel, stride 1, no padding, no dilation


class _PackedWeight(ctypes.Structure):
    """``PackedWeight`` of avx2.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("panels", "weight_sum")] + [(n, ctypes.c_int64) for n in _FIELDS]


@functools.cache
def _openmp() -> list[str]:
    """Torch's copy of the OpenMP runtime: with a second copy, two thread pools would compete for the cores."""
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return [str(found[0])] if found else []


def _build(compiler: str) -> Path:
    text = SOURCE.read_bytes()
    key = hashlib.sha256(text + " ".join((compiler, *FLAGS, *_openmp(), torch.__version__)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "inductor_kernels")
    library = folder / f"avx2-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, "avx2.so")
            command = [compiler, *FLAGS, str(SOURCE), *_openmp(), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            made.replace(library)  # atomically, so that no other process loads half a library
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C functions; None on other CPUs, without a compiler, or where the kernel is turned off or does not build."""
    capability = torch.backends.cpu.get_cpu_capability()
    if os.environ.get("INDUCTOR_KERNELS_AVX2") == "0" or not capability.startswith("AVX"):
        return None
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("inductor_kernels: the AVX2 kernel was not built, 8-bit weights run in float32: %s", error)
        return None
    library.inductor_kernels_product.argtypes = [
        *[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 4, *[ctypes.c_float] * 2, ctypes.c_int64
    ]  # fmt: skip
    library.inductor_kernels_product.restype = ctypes.c_int
    library.inductor_kernels_quantize.argtypes = [
        *[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_float] * 3, ctypes.c_int64
    ]  # fmt: skip
    library.inductor_kernels_quantize.restype = None
    library.inductor_kernels_quantize_planes.argtypes = [
        *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4, *[ctypes.c_float] * 3, ctypes.c_int64
    ]  # fmt: skip
    library.inductor_kernels_quantize_planes.restype = None
    return library


def available() -> bool:
    """Whether the kernel runs on this machine. The first call may compile it, which takes a second or two."""
    return _library() is not None


def pack(w: Tensor) -> Tensor:
    """int8 weight [N, ...] as int16 panels [ceil(N / 16), ceil(K / 2), 16, 2]: pairs of inputs for 16 outputs each, K
    being the product of the other dimensions; padded with zeros."""
    rows = w.flatten(1).to(torch.int16)
    rows = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2, 0, -rows.shape[0] % COLUMNS))
    return rows.view(-1, COLUMNS, rows.shape[1] // 2, 2).permute(0, 2, 1, 3).contiguous()


class PackedWeight:
    """A weight laid out for one geometry, with all arguments of the kernel that stay the same from call to call.

    panels: from :func:`pack`; weight_sum: int32 [N]; image: (H, W, C, OH, OW); geometry: kernel, stride, padding,
    dilation, two numbers each. A linear layer is a convolution of images of one pixel.
    """

    __slots__ = ("panels", "weight_sum", "layout", "address")

    def __init__(self, panels: Tensor, weight_sum: Tensor, image: tuple[int, ...], geometry: tuple[int, ...]) -> None:
        self.panels, self.weight_sum = panels, weight_sum
        *size, out_h, out_w = image
        addresses = panels.data_ptr(), weight_sum.data_ptr()
        self.layout = _PackedWeight(*addresses, *size, *geometry, out_h, out_w, weight_sum.shape[0])
        self.address = ctypes.addressof(self.layout)

    def of_images(self, image: tuple[int, ...], geometry: tuple[int, ...]) -> "PackedWeight":
        """The same panels for other images."""
        return PackedWeight(self.panels, self.weight_sum, image, geometry)


def pack_linear(w: Tensor) -> PackedWeight:
    """w: int8 [N, K]."""
    return PackedWeight(pack(w), w.sum(1, dtype=torch.int32), (1, 1, w.shape[1], 1, 1), POINTWISE)


def pack_conv2d(w: Tensor, image: tuple[int, ...], geometry: tuple[int, ...]) -> PackedWeight:
    """w: int8 [N, kh, kw, C]; image and geometry as in :class:`PackedWeight`."""
    return PackedWeight(pack(w), w.flatten(1).sum(1, dtype=torch.int32), image, geometry)


def product(
    packed: PackedWeight, x: Tensor, scale: Tensor, zero_point: int, bias: Tensor | None, row_scale: Tensor | None,
    shape: tuple[int, ...], inv_scale: float = 0.0, levels: int = 0, planes: bool = False,
) -> Tensor:  # fmt: skip
    """float32 result of shape ``shape`` [..., N]: the product of codes ``x`` (rows [..., K], or images [B, H, W, C] of
    the size that ``packed`` was made for) and the weight.

    With ``levels``, for linear layers only, ``x`` is float32 and quantized on the way. With ``planes`` the result lies
    in memory as [B, N, OH, OW].
    """
    library = _library()
    assert library is not None
    layout = packed.layout
    x, scale = x.contiguous(), scale.contiguous()
    if bias is not None and not (bias.dtype is torch.float32 and bias.is_contiguous()):
        bias = bias.to(torch.float32).contiguous()
    if row_scale is not None:
        row_scale = row_scale.contiguous()
    if planes:
        batch, *size, n = shape
        y = torch.empty((batch, n, *size), dtype=torch.float32).permute(0, 2, 3, 1)
    else:
        y = torch.empty(shape, dtype=torch.float32)
    address = x.data_ptr()
    failed = library.inductor_kernels_product(
        packed.address,
        None if levels else address,
        address if levels else None,
        y.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if row_scale is None else row_scale.data_ptr(),
        x.numel() // (layout.height * layout.width * layout.channels),
        zero_point,
        x.dtype is torch.int8,
        planes,
        inv_scale,
        levels,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("inductor_kernels: no memory for the rows of a product")
    return y


def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """uint8 codes of a float32 tensor, clamp(round(x * inv_scale + zero_point), 0, levels), in one pass."""
    library = _library()
    assert library is not None
    codes = torch.empty_like(x, dtype=torch.uint8)
    if codes.stride() != x.stride():  # x has gaps or overlaps, which its codes do not have
        x = torch.empty_like(x).copy_(x)
    library.inductor_kernels_quantize(
        x.data_ptr(), codes.data_ptr(), x.numel(), inv_scale.item(), zero_point.item(), levels, torch.get_num_threads()
    )
    return codes


def quantize_planes(x: Tensor, inv_scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """uint8 codes [B, H, W, C], contiguous, of a float32 tensor whose images lie in memory as [C, H, W]."""
    library = _library()
    assert library is not None
    batch, height, width, channels = x.shape
    codes = torch.empty(x.shape, dtype=torch.uint8)
    library.inductor_kernels_quantize_planes(
        x.data_ptr(), codes.data_ptr(), batch, x.stride(0), channels, height * width,
        inv_scale.item(), zero_point.item(), levels, torch.get_num_threads(),
    )  # fmt: skip
    return codes
