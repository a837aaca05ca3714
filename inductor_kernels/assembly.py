"""What can be read off a kernel's machine code: its tensor-core products, and the loop they stand in."""

import re
from dataclasses import dataclass

PTX_PRODUCT = r"((?:wgmma\.mma_async|\bmma)\.sync\.aligned\.m[\w.]+|tcgen05\.mma[\w.:]+)"
PRODUCT = r"\b((?:IMMA|HMMA|IGMMA|HGMMA|UTC\w*MMA)[\w.]*)"
OF_A_WARP = r"[IH]MMA\.(16)(8)(\d+)"  # IMMA.16832
OF_FOUR_WARPS = r"[IH]GMMA\.(\d+)x(\d+)x(\d+)"  # IGMMA.64x128x32


@dataclass(frozen=True, slots=True)
class Loop:
    """One turn of a loop in one warp: instructions issued, and operations of the tensor cores among them.

    A multiplication and an addition are two operations. A GPU that can do ``p`` of them per cycle and processor is kept
    busy by a loop with more than ``p / 4`` operations for each instruction, as a processor issues four at a time; with
    fewer, its schedulers are what the kernel waits for.
    """

    instructions: int
    operations: int


def products(machine: str, ptx: str = "") -> set[str]:
    """Names of the tensor-core instructions in the text of a disassembler and in PTX."""
    return {*re.findall(PRODUCT, machine), *re.findall(PTX_PRODUCT, ptx)}


def loop(machine: str) -> Loop | None:
    """The longest loop with tensor-core products, None where there is none (a few steps are written out) or where its
    products do not say how large they are (sm_100's)."""
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
    """Of the tensor cores, for one warp."""
    for pattern, warps in ((OF_A_WARP, 1), (OF_FOUR_WARPS, 4)):
        if size := re.search(pattern, instruction):
            m, n, k = map(int, size.groups())
            return 2 * m * n * k // warps
    return 0
