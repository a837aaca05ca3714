"""The C kernel for x86 without VNNI: built once with the machine's compiler, when there is one.

INDUCTOR_KERNELS_AVX2=0 turns it off; XDG_CACHE_HOME says where the library is kept.
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
COLUMNS = 16
_FIELDS = (
    "batch height width channels kernel_h kernel_w stride_h stride_w pad_h pad_w dilation_h dilation_w "
    "out_h out_w columns zero_point is_signed threads"
).split()


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _FIELDS]


@functools.cache
def _openmp() -> list[str]:
    """Torch's own copy of the OpenMP runtime: with a second one, two sets of threads would fight for the cores."""
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
            made.replace(library)  # at once, so that another process never sees half a library
    return library


@functools.cache
def _function():
    """The C function, or None where it cannot be had."""
    capability = torch.backends.cpu.get_cpu_capability()
    if os.environ.get("INDUCTOR_KERNELS_AVX2") == "0" or not capability.startswith("AVX"):
        return None
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    try:
        function = ctypes.CDLL(str(_build(compiler))).inductor_kernels_product
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("inductor_kernels: the AVX2 kernel was not built, 8-bit weights run in float32: %s", error)
        return None
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.POINTER(_Shape)]
    function.restype = ctypes.c_int
    return function


def available() -> bool:
    """Whether the kernel runs here. The first call may compile it, which takes a second or two."""
    return _function() is not None


def pack(w: Tensor) -> Tensor:
    """int8 weight [N, ...] as int16 panels [ceil(N / 16), ceil(K / 2), 16, 2]: pairs of inputs, 16 outputs abreast."""
    rows = w.flatten(1).to(torch.int16)
    rows = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2, 0, -rows.shape[0] % COLUMNS))
    return rows.view(-1, COLUMNS, rows.shape[1] // 2, 2).permute(0, 2, 1, 3).contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def product(
    x_q: Tensor, panels: Tensor, weight_sum: Tensor, scale: Tensor, zero_point: int, bias: Tensor | None,
    row_scale: Tensor | None, n: int, geometry: tuple[int, ...], out_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """float32 [B, OH, OW, N] of codes [B, H, W, C]; geometry: kernel, stride, padding, dilation, two numbers each.

    A linear layer passes [M, K] as [M, 1, 1, K].
    """
    function = _function()
    assert function is not None
    x_q, scale = x_q.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    row_scale = None if row_scale is None else row_scale.contiguous()
    weight_sum = weight_sum.contiguous()
    y = torch.empty((x_q.shape[0], *out_size, n), dtype=torch.float32)
    shape = _Shape(*x_q.shape, *geometry, *out_size, n, zero_point, x_q.dtype == torch.int8, torch.get_num_threads())
    addresses = (_address(t) for t in (x_q, panels, weight_sum, scale, bias, row_scale, y))
    if function(*addresses, ctypes.byref(shape)):
        raise MemoryError("inductor_kernels: no memory for the rows of a product")
    return y
