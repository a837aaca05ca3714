"""What was measured, where and with what: one JSON per step, one Markdown page of all."""

import json
import platform
import subprocess
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch


def machine() -> dict[str, str]:
    """Hardware, versions and commit."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git there
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    versions = {"torch": torch.__version__, "commit": commit or "unknown", "device": device}
    for name in ("triton", "torchao"):
        try:
            versions[name] = __import__(name).__version__
        except Exception:  # of a package made for another torch, anything
            versions[name] = "missing"
    return versions


def failure(error: Exception) -> dict[str, str]:
    """What a row says of what failed; the log has all of it. Raises where the GPU can do no more, whatever is tried."""
    traceback.print_exception(error)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def write(folder: Path, step: str, rows: Iterable[dict], *, dry: bool) -> bool:
    """Write after every row, so that a step that is cut off keeps what it has. Returns whether none of them failed."""
    path = folder / f"{step}.json"
    document = {"machine": machine(), "dry_run": dry, "rows": []}
    for row in rows:
        document["rows"].append(row)
        path.write_text(json.dumps(document, indent=1))
        print(" ".join(f"{key}={_text(value)}" for key, value in row.items()), flush=True)
    return not any("error" in row for row in document["rows"])


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


BASES = ("fp16 eager", "fp16 compiled", "torchao-int8 compiled")  # what variants of a model are compared with


def _compared(rows: list[dict]) -> list[dict]:
    """With how many times as fast as each of ``BASES`` a variant is, where both were timed."""
    times = {row["variant"]: row["ms"] for row in rows if {"variant", "ms"} <= set(row)}
    against = {base: times[base] for base in BASES if base in times}
    return [
        row | ({f"times {base}": ms / row["ms"] for base, ms in against.items()} if "ms" in row else {}) for row in rows
    ]


def report(folder: Path) -> str:
    """Markdown tables of every step in the folder; also written to ``results.md``."""
    parts = ["# Measured on a GPU"]
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if "rows" not in document:  # the tiles of a dry run
            continue
        about = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
        parts += [f"## {path.stem}", ("Dry run: the figures mean nothing. " if document["dry_run"] else "") + about]
        rows = _compared(document["rows"])
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = [columns, ["---"] * len(columns)]
        table += [[_text(row.get(column, "")) for column in columns] for row in rows]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in table))
    text = "\n\n".join(parts) + "\n"
    (folder / "results.md").write_text(text)
    return text
