"""Labels for the names in result files, and formats of figures."""

from __future__ import annotations

import re
from pathlib import Path

# variant: (label, what it is)
KNOWN = {
    "fp32": ("Full precision", "32-bit floating point, the reference"),
    "naive_w8a8": ("Naive W8A8", "every layer 8 bit, one range for everything, BOS inside"),
    "bos_w8a8": ("BOS-aware W8A8", "the first text token apart, shortcuts split"),
    "mixdq_w8a8": ("MixDQ W8A8", "8 bits per weight on average, chosen per layer"),
    "naive_w4a8": ("Naive W4A8", "4-bit weights everywhere, BOS inside"),
    "bos_w4a8": ("BOS-aware W4A8", "4-bit weights everywhere, BOS apart"),
    "mixdq_w4a8": ("MixDQ W4A8", "4 bits per weight on average, chosen per layer"),
    "mixdq_w3a8": ("MixDQ W3A8", "3 bits per weight on average, chosen per layer"),
    "additive_w4a8": ("Least summed error", "W4A8, all layers by the error power of the model's output"),
    "decoupled_w4a8": ("Decoupled metrics", "W4A8 as published: SSIM for content, SQNR for quality layers"),
    "sqnr_w4a8": ("SQNR for all layers", "W4A8, every layer by the SQNR of the model's output"),
}
OBJECTIVES = {
    "additive": "least summed error",
    "decoupled": "decoupled metrics (published)",
    "sqnr": "SQNR for all layers",
}
MISSING = "–"


def label(name: str) -> str:
    """A readable name; unknown ones with spaces for underscores."""
    return KNOWN[name][0] if name in KNOWN else name.replace("_", " ")


def describe(name: str) -> str:
    return KNOWN.get(name, ("", ""))[1]


def plan_label(stem: str) -> str:
    """ "plan_w4a8" as "W4A8"."""
    return stem.removeprefix("plan_").replace("_", " ").upper()


def plan_order(path: Path) -> tuple[int, str]:
    """Sort key: most weight bits first."""
    found = re.search(r"w(\d+)", path.stem)
    return (-int(found[1]) if found else 0, path.stem)


def block_of(name: str) -> str:
    """The part of a UNet a layer belongs to: "down_blocks.1", "mid_block", "input", "output", or the first part."""
    first, _, rest = name.partition(".")
    if first in ("down_blocks", "up_blocks", "transformer_blocks", "single_transformer_blocks"):
        return f"{first}.{rest.partition('.')[0]}"
    if first in ("conv_in", "time_embedding", "add_embedding"):
        return "input"
    return "output" if first in ("conv_out", "proj_out") else first


def block_rank(block: str) -> int:
    """Sort key: blocks in the order of the data flow; a UNet registers its middle block last."""
    ranks = {"input": 0, "down_blocks": 1, "mid_block": 2, "up_blocks": 3, "output": 5}
    return ranks.get(block.partition(".")[0], 4)


def percent(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{100 * value:.{digits}f}\u00a0%"


def decibel(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}\u00a0dB"


def number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent if that is readable."""
    if value is None:
        return MISSING
    if 1000 <= abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:.{digits}g}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:.1e}"


def size(count: float | None) -> str:
    """A number of bytes in B, KiB or MiB."""
    if count is None:
        return MISSING
    for unit, step in (("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= step:
            return f"{count / step:.2f}\u00a0{unit}" if count < 10 * step else f"{count / step:.1f}\u00a0{unit}"
    return f"{count:.0f}\u00a0B"


def ordinal(value: int) -> str:
    """1st, 2nd, 3rd, 4th, ... 11th, 12th, 13th."""
    suffix = "th" if 10 <= value % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    return f"{value}{suffix}"


def anchor(name: str) -> str:
    """The id of a layer's row."""
    return "layer-" + "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
