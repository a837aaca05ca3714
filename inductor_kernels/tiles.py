"""Tile sizes per GPU architecture: a short list each, of tiles that fit shared memory and spill no registers.

With max-autotune Inductor times all tiles that suit a shape; :mod:`inductor_kernels.tuned` chooses the default.
"""

from dataclasses import dataclass

from .packing import run_length


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and depth (inputs per step) of the block that a program computes, pipeline stages, and warps."""

    m: int
    n: int
    k: int
    stages: int
    warps: int

    @property
    def parts(self) -> int:
        """Into how many groups of columns the epilogue is divided. Groups are computed one after the other: the more,
        the fewer registers are needed. But a row of a group should fill a memory sector (32 bytes of codes), and a
        group should give each thread at least 8 elements."""
        most = min(self.n // 32, self.m * self.n // (self.warps * 32) // 8)
        return 4 if most >= 4 else 2 if most >= 2 else 1

    def options(self) -> dict[str, int]:
        """The tile as keyword arguments of a template."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "PARTS": self.parts,
            "num_stages": self.stages,
            "num_warps": self.warps,
        }


SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # per block, at most
INT8_PER_CYCLE = {
    80: 4096,
    86: 2048,
    89: 2048,
    90: 8192,
    100: 16384,
    120: 2048,
}  # operations of an SM's tensor cores, dense
SMS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # of the largest chip

_SMALL = [Tile(16, 64, 128, 4, 4), Tile(32, 64, 128, 4, 4), Tile(64, 64, 128, 3, 4), Tile(64, 128, 64, 4, 4)]
_AMPERE = [*_SMALL, Tile(128, 64, 64, 4, 4), Tile(128, 128, 64, 3, 8), Tile(128, 128, 128, 3, 8)]
_SMALL_SHARED = [*_SMALL, Tile(128, 64, 64, 3, 4), Tile(128, 128, 64, 3, 8)]
# On Hopper, Triton waits for the int8 products at the end of every step. A program of the largest tile runs alone on
# its SM, where nothing hides that wait, so this tile has deep steps only.
_HOPPER = [
    *_SMALL,
    Tile(128, 64, 128, 4, 4),
    Tile(128, 128, 64, 4, 8),
    Tile(128, 128, 128, 3, 8),
    Tile(256, 128, 128, 3, 8),
]

# On sm_100, sums move from tensor memory through their warps' registers, so other tiles spill than on Hopper.
_BLACKWELL = [
    Tile(16, 64, 128, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(64, 64, 128, 4, 8),
    Tile(128, 64, 128, 4, 4),
    Tile(128, 128, 64, 4, 8),
]
_GEFORCE = [  # 64 x 64 spills with four warps
    Tile(16, 64, 128, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(64, 64, 128, 3, 8),
    Tile(64, 128, 64, 4, 4),
    Tile(128, 64, 64, 3, 4),
    Tile(128, 128, 64, 3, 8),
]

TILES = {80: _AMPERE, 86: _SMALL_SHARED, 89: _SMALL_SHARED, 90: _HOPPER, 100: _BLACKWELL, 120: _GEFORCE}


def family(capability: int) -> int:
    """The newest listed architecture that is not newer than ``capability``; its tiles are used."""
    known = [listed for listed in TILES if listed <= capability]
    if not known:
        raise ValueError(f"compute capability {capability}: expected at least {min(TILES)}")
    return max(known)


SINGLE = 16  # results per thread that fit its registers in float32, which runs without tensor cores


def fitting(capability: int, m: int, n: int, *, bytes_per_code: int = 1) -> list[Tile]:
    """The tiles that are not much larger than an [m, n] result. bytes_per_code: size of an activation."""
    listed = TILES[family(capability)]
    if bytes_per_code == 4:
        listed = [tile for tile in listed if tile.m * tile.n <= 32 * tile.warps * SINGLE]
    rows = max(16, 1 << (m - 1).bit_length()) if m > 1 else 16
    columns = max(64, 1 << (n - 1).bit_length()) if n > 1 else 64
    return [tile for tile in listed if tile.m <= rows and tile.n <= columns] or listed[:1]


def narrowed(tile: Tile, k: int, bytes_per_code: int = 1, bits: int = 8) -> Tile:
    """The tile with a depth that reads as many bytes of activations per step as with 8-bit codes, is not much larger
    than ``k``, the last dimension of the weight, and is at least a run of packed codes.

    bytes_per_code: 2 for 16-bit and 4 for 32-bit activations. bits: of a weight.
    """
    depth = max(32, 1 << (k - 1).bit_length()) if k > 1 else 32
    run = 16 if bits == 8 else run_length(k, bits) * 8 // bits
    return Tile(tile.m, tile.n, max(run, min(depth, tile.k // bytes_per_code)), tile.stages, tile.warps)
