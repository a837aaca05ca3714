"""Reads a kernel's machine code: its tensor-core instructions, and the size of its main loop."""

import re
from dataclasses import dataclass

PTX_PRODUCT = r"((?:wgmma\.mma_async|\bmma)\.sync\.aligned\.m[\w.]+|tcgen05\.mma[\w.:]+)"
PRODUCT = r"\b((?:IMMA|HMMA|IGMMA|HGMMA|UTC\w*MMA)[\w.]*)"
OF_A_WARP = r"[IH]MMA\.(16)(8)(\d+)"  # IMMA.16832
OF_FOUR_WARPS = r"[IH]GMMA\.(\d+)x(\d+)x(\d+)"  # IGMMA.64x128x32


@dataclass(frozen=True, slots=True)
class Loop:
    """One iteration of a loop in one warp: instructions issued, and operations that tensor cores do for them.

    A multiplication and an addition are two operations. A processor (SM) issues four instructions per cycle. If its
    tensor cores do ``p`` operations per cycle (``tiles.INT8_PER_CYCLE``), a loop keeps them busy with more than
    ``p / 4`` operations per instruction; with fewer, the kernel is limited by instruction issue.
    """

    instructions: int
    operations: int


def products(machine: str, ptx: str = "") -> set[str]:
    """Names of the tensor-core instructions in disassembled machine code and in PTX."""
    return {*re.findall(PRODUCT, machine), *re.findall(PTX_PRODUCT, ptx)}


def loop(machine: str) -> Loop | None:
    """The longest loop with tensor-core instructions. None where there is none (loops of a few steps are unrolled), or
    where the instructions' names do not contain their size (sm_100)."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    found: list[str] = []
    for text in machine.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", text):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", text):
            lines.append(instruction[1])
            back = re.search(r"\bBRA\b.*\((\.L_\w+)\)", instruction[1])
            body = lines[labels[back[1]] :] if back and back[1] in labels else []
            if len(body) > len(found) and any(_operations(line) for line in body):
                found = body
    return Loop(len(found), sum(map(_operations, found))) if found else None


def _operations(instruction: str) -> int:
    """Operations of a tensor-core instruction for one warp; 0 for other instructions."""
    for pattern, warps in ((OF_A_WARP, 1), (OF_FOUR_WARPS, 4)):
        if size := re.search(pattern, instruction):
            m, n, k = map(int, size.groups())
            return 2 * m * n * k // warps
    return 0
