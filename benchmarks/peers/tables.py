"""Rows of figures as Markdown."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
TITLES = (
    "quantizes", "MiB", "bits", "agreement, 1 step", "PSNR dB", "agreement, 4 steps", "PSNR dB", "SSIM", "Fréchet",
    "ours, MiB", "ours, PSNR dB", "eager, times float32", "call, MiB", "seconds",
)  # fmt: skip
MEBI = 2**20
_ACTIVATIONS = "activations"


def cells(row: Row, best: Row | None = None) -> list[str]:
    """``best``: our row that holds at most as many bytes."""
    if "error" in row:
        return [row["error"]]
    bits = row.get("average_weight_bits")
    found = [row["does"], f"{row['bytes'] / MEBI:.2f}", "" if bits is None else f"{bits:.2f}"]
    for steps in ("1", "4"):
        p = row["pictures"][steps]
        found += [f"{p['agreement']:.1%}", _db(p["psnr"])]
    p = row["pictures"]["4"]
    found += [f"{p['ssim']:.4f}", f"{p['frechet']:.2f}"]
    found += ["", ""] if best is None else [f"{best['bytes'] / MEBI:.2f}", _db(best["pictures"]["4"]["psnr"])]
    return [*found, f"{row['speedup']:.2f}", f"{row['call_peak'] / MEBI:.0f}", f"{row['seconds']:.0f}"]


def _db(value: float | None) -> str:
    return "same" if value is None else f"{value:.1f}"


def best_within(row: Row, ours: list[Row]) -> Row | None:
    """Our row of the best pictures at 4 steps among those of at most as many bytes. Who quantizes activations, for
    products of integers, is compared with ours that do."""
    if "error" in row:
        return None
    fitting = [o for o in ours if "error" not in o and o["bytes"] <= row["bytes"]]
    if _ACTIVATIONS in row["does"]:
        fitting = [o for o in fitting if _ACTIVATIONS in o["does"]]
    return max(fitting, key=lambda o: o["pictures"]["4"]["psnr"], default=None)


def table(rows: dict[str, Row]) -> str:
    """Peers first, each beside the best of ours in at most as many bytes; ours last, in bold."""
    own = [row for name, row in rows.items() if name.startswith("ours")]
    lines = ["| contender | " + " | ".join(TITLES) + " |", "|---" * (len(TITLES) + 1) + "|"]
    for name, row in rows.items():
        mine = name.startswith("ours")
        found = cells(row, None if mine else best_within(row, own))
        bold = "**" if mine else ""
        lines.append(f"| {bold}{name}{bold} | " + " | ".join([*found, *[""] * (len(TITLES) - len(found))]) + " |")
    return "\n".join(lines)


def behind(rows: dict[str, Row]) -> list[str]:
    """Peers that no plan of ours of their kind matches in bytes and PSNR at once (4 steps)."""
    own = [row for name, row in rows.items() if name.startswith("ours")]
    better = []
    for name, row in rows.items():
        if name.startswith("ours") or "error" in row:
            continue
        best, psnr = best_within(row, own), row["pictures"]["4"]["psnr"]
        if psnr is None or best is None or best["pictures"]["4"]["psnr"] < psnr:
            better.append(name)
    return better
