"""How long a kernel must take on a GPU: bytes, operations, and the machine's limits.

Decides what cannot be measured where code is generated (which tile is the default, whether a product computes its own
codes), and says beside measurements what there is to reach. Limits are those of the vendors' data sheets, dense; shares
of them that kernels reach are round numbers, not measurements.
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
OTHERS = (  # the same architectures with other limits
    Machine("H100", 1979e12, 989e12, 33.5e12, 3.35e12, 50e6),
    Machine("4090", 660e12, 165e12, 41e12, 1.01e12, 72e6),
)
LAUNCH = 2e-6  # seconds from one kernel of a CUDA graph to the next
CACHE = 60e9  # bytes per second that the second-level cache delivers to each processor
LATENCY = 0.7e-6  # seconds from asking memory for the first bytes of a tile to having them
BETWEEN = 0.1e-6  # seconds from one step's products to the next step's in the same program: a barrier, fences, copies
FINISH, FINISH_GATED = 12, 27  # instructions for each sum behind its reduction, as assembled; activations add to it
REGISTERS = 65536  # per processor
THREADS = 1536  # that a processor holds at least


def machine(device_name: str) -> Machine | None:
    """The listed machine whose name is part of ``device_name``, as torch.cuda.get_device_name() gives it."""
    return next((m for m in (*OTHERS, *MACHINES.values()) if m.name in device_name), None)


@dataclass(frozen=True, slots=True)
class Product:
    """[m, k] times [k, n] with integer activations; for a convolution m is pixels and k runs over taps and channels.

    bits: of a weight; out: bytes of a result; taps: of a convolution, which need not read its input once for each;
    finish: instructions from a sum to what is written of it.
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
        """Read and written once: codes, weights, results."""
        return self.m * self.k / self.taps + self.n * self.k * self.bits / 8 + self.m * self.n * self.out


def least(product: Product, limits: Machine) -> float:
    """Seconds that no kernel beats: all at the peak of the tensor cores, or all bytes at that of the memory."""
    return max(product.operations / limits.int8, product.bytes / limits.bandwidth)


def seconds(product: Product, tile: Tile, capability: int, split_k: int = 1) -> float:
    """What a product is expected to take with a tile: programs come in waves over the processors, each limited by its
    products, by what the cache delivers, by the steps it takes one after the other and the work behind them, or by
    waiting for memory. Steps are whole ones: what a tile is deeper than a tap's channels is multiplied too.

    split_k: programs that share the reduction of a tile. Their sums, 4 bytes each, are added by what reads them.
    """
    architecture = family(capability)
    limits, processors = MACHINES[architecture], SMS[architecture]
    programs = math.ceil(product.m / tile.m) * math.ceil(product.n / tile.n) * split_k
    resident = max(1, min(resident_programs(tile), SHARED_BYTES[architecture] // shared_bytes(tile)))
    waves, last = divmod(programs, processors * resident)
    steps = math.ceil(product.taps * math.ceil(product.k / product.taps / tile.k) / split_k)
    depth = steps * tile.k
    finish = tile.m * tile.n * product.finish / (limits.vector / processors)
    waiting = LATENCY * (1 + steps / max(1, tile.stages - 1) / 4)  # with copies in flight, a quarter of a round trip

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
    """Programs whose registers a processor holds: 32 and half as many again as sums for each thread, as the assembler
    gives them (benchmarks/results/tiles.md)."""
    threads = 32 * tile.warps
    return min(THREADS // threads, int(REGISTERS // (threads * 32 + 1.5 * tile.m * tile.n)))


def shared_bytes(tile: Tile, read: int = 1) -> int:
    """Shared memory a tile takes at most. ``read``: bytes from which one activation code is made (1: it is read)."""
    return tile.stages * tile.k * (tile.m * read + tile.n)


def prologue_fits(tile: Tile, capability: int, *, read: int) -> bool:
    """Whether a tile leaves room for ``read`` bytes from which each code is made."""
    return shared_bytes(tile, read) <= SHARED_BYTES[family(capability)]


def prologue_seconds(product: Product, tile: Tile, capability: int, *, work: int, read: int) -> float:
    """What a product is expected to take that computes its codes itself, once per column of tiles.

    work: operations per code; read: bytes from which a code is made.
    """
    architecture = family(capability)
    codes = product.m * product.k * math.ceil(product.n / tile.n)
    inside = codes * (work / MACHINES[architecture].vector + (read - 1) / (CACHE * SMS[architecture]))
    return inside + seconds(product, tile, capability)


def prologue_pays(product: Product, tile: Tile, capability: int, *, work: int, read: int, otherwise: float) -> bool:
    """Whether that is sooner than a kernel that makes the codes and one that reads them, ``otherwise`` seconds."""
    apart = LAUNCH + product.m * product.k / product.taps * (read + 1) / MACHINES[family(capability)].bandwidth
    return prologue_seconds(product, tile, capability, work=work, read=read) <= apart + otherwise
