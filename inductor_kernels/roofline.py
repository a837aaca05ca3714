"""A roofline model: how long a product takes on a GPU by its bytes, its operations and the machine's limits.

It decides what cannot be measured while code is generated: the default tile, and whether a product computes its own
codes. Benchmarks print its bounds beside measured times. Limits are from the vendors' data sheets, dense; overheads and
latencies are assumed round numbers, not measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .tiles import SHARED_BYTES, SMS, Tile, family


@dataclass(frozen=True, slots=True)
class Machine:
    """Operations per second with 8 and 16 bits (tensor cores) and of the float32 units (an FMA is one), bytes per
    second of the memory, and bytes of the second-level cache."""

    name: str
    int8: float
    half: float
    vector: float
    bandwidth: float
    cache: float


MACHINES = {
    80: Machine("A100", 624e12, 312e12, 9.7e12, 2.04e12, 40e6),
    86: Machine("A40", 299e12, 150e12, 18.7e12, 0.70e12, 6e6),
    89: Machine("L40", 362e12, 181e12, 45e12, 0.86e12, 96e6),
    90: Machine("H200", 1979e12, 989e12, 33.5e12, 4.8e12, 50e6),
    100: Machine("B200", 4500e12, 2250e12, 37e12, 7.7e12, 126e6),
    120: Machine("RTX 5090", 838e12, 210e12, 52e12, 1.79e12, 96e6),
}
OTHERS = (  # other GPUs of the same architectures
    Machine("H100", 1979e12, 989e12, 33.5e12, 3.35e12, 50e6),
    Machine("4090", 660e12, 165e12, 41e12, 1.01e12, 72e6),
)
# "Processor" below is a streaming multiprocessor (SM).
LAUNCH = 2e-6  # assumed: seconds between two kernels of a CUDA graph
CACHE = 60e9  # assumed: bytes per second that the second-level cache delivers to each processor
LATENCY = 0.7e-6  # assumed: seconds from requesting the first bytes of a tile to receiving them from memory
OVERLAP = 4  # assumed: with copies in flight, a round of pipeline stages waits for a quarter of LATENCY
BETWEEN = 0.1e-6  # assumed: seconds between the products of two steps of one program (a barrier, fences, copies)
FINISH, FINISH_GATED = 12, 27  # epilogue instructions per sum, counted in machine code; activations come on top
REGISTERS = 65536  # per processor
THREADS = 1536  # per processor, the least of all architectures


def machine(device_name: str) -> Machine | None:
    """The listed machine whose name is part of ``device_name``, as torch.cuda.get_device_name() gives it."""
    return next((m for m in (*OTHERS, *MACHINES.values()) if m.name in device_name), None)


@dataclass(frozen=True, slots=True)
class Product:
    """[m, k] times [k, n] with integer activations; for a convolution m is pixels and k runs over taps and channels.

    bits: of a weight; out: bytes of a result; taps: of a convolution, which reads its input once for all of them;
    finish: instructions per sum in the epilogue.
    """

    m: int
    n: int
    k: int
    bits: int = 8
    out: int = 2
    taps: int = 1
    finish: int = FINISH

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> float:
        """Bytes of codes, weights and results, each read or written once."""
        return self.m * self.k / self.taps + self.n * self.k * self.bits / 8 + self.m * self.n * self.out


def least(product: Product, limits: Machine) -> float:
    """A lower bound in seconds: all operations at the tensor cores' peak, or all bytes at the memory's."""
    return max(product.operations / limits.int8, product.bytes / limits.bandwidth)


def seconds(product: Product, tile: Tile, capability: int, split_k: int = 1) -> float:
    """Expected seconds for a product with a tile. Programs run in waves over the processors. A wave is limited by its
    operations, by the bandwidth of the cache, by the sequence of steps and epilogue in a program, or by waiting for
    memory. Steps are counted whole: where a tile is deeper than a tap's channels, the rest is multiplied too.

    split_k: programs that share the reduction of a tile. The next kernel reads and adds their sums, 4 bytes each.
    """
    architecture = family(capability)
    limits, processors = MACHINES[architecture], SMS[architecture]
    programs = math.ceil(product.m / tile.m) * math.ceil(product.n / tile.n) * split_k
    resident = max(1, min(resident_programs(tile), SHARED_BYTES[architecture] // shared_bytes(tile)))
    waves, last = divmod(programs, processors * resident)
    steps = math.ceil(product.taps * math.ceil(product.k / product.taps / tile.k) / split_k)
    depth = steps * tile.k
    finish = tile.m * tile.n * product.finish / (limits.vector / processors)
    waiting = LATENCY * (1 + steps / max(1, tile.stages - 1) / OVERLAP)

    def wave(each: int) -> float:
        """Seconds with ``each`` programs on a processor."""
        alone = 2 * tile.m * tile.n * depth / (limits.int8 / processors)
        loads = each * (tile.m + tile.n * product.bits / 8) * min(product.k, depth)
        return max(each * alone, each * finish, alone + steps * BETWEEN + finish, loads / CACHE, waiting)

    total = waves * wave(resident) + (wave(math.ceil(last / processors)) if last else 0)
    total = LAUNCH + max(total, product.bytes / limits.bandwidth)
    if split_k > 1:
        sums = 4 * split_k * product.m * product.n
        total += LAUNCH + 2 * sums / (CACHE * processors if sums < limits.cache / 2 else limits.bandwidth)
    return total


def resident_programs(tile: Tile) -> int:
    """How many programs fit a processor's registers: each thread takes 32 registers plus 1.5 per sum, a fit to the
    assembler's counts (benchmarks/results/tiles.md)."""
    threads = 32 * tile.warps
    return min(THREADS // threads, int(REGISTERS // (threads * 32 + 1.5 * tile.m * tile.n)))


def shared_bytes(tile: Tile, read: int = 1) -> int:
    """The most shared memory a tile takes. ``read``: bytes read per activation code; more than 1 where the kernel
    computes it."""
    return tile.stages * tile.k * (tile.m * read + tile.n)


def prologue_fits(tile: Tile, capability: int, *, read: int) -> bool:
    """Whether a tile fits shared memory where each code is computed from ``read`` bytes."""
    return shared_bytes(tile, read) <= SHARED_BYTES[family(capability)]


def prologue_seconds(product: Product, tile: Tile, capability: int, *, work: int, read: int) -> float:
    """Expected seconds for a product that computes its own codes, again for every column of tiles.

    work: operations per code; read: bytes read per code.
    """
    architecture = family(capability)
    codes = product.m * product.k * math.ceil(product.n / tile.n)
    inside = codes * (work / MACHINES[architecture].vector + (read - 1) / (CACHE * SMS[architecture]))
    return inside + seconds(product, tile, capability)


def prologue_pays(product: Product, tile: Tile, capability: int, *, work: int, read: int, otherwise: float) -> bool:
    """Whether :func:`prologue_seconds` is at most the time of two kernels: one that writes the codes, and a product
    that reads them and takes ``otherwise`` seconds."""
    apart = LAUNCH + product.m * product.k / product.taps * (read + 1) / MACHINES[family(capability)].bandwidth
    return prologue_seconds(product, tile, capability, work=work, read=read) <= apart + otherwise
