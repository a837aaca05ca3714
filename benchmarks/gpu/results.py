"""What was measured, where and with what: one JSON per step, one Markdown page of all."""

import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch


def machine() -> dict[str, str]:
    """Hardware, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    versions = {"torch": torch.__version__, "commit": commit or "unknown", "device": device}
    for name in ("triton", "torchao"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            versions[name] = "missing"
    return versions


def write(folder: Path, step: str, rows: Iterable[dict], *, dry: bool) -> None:
    """Write after every row, so that a step that is cut off keeps what it has."""
    path = folder / f"{step}.json"
    document = {"machine": machine(), "dry_run": dry, "rows": []}
    for row in rows:
        document["rows"].append(row)
        path.write_text(json.dumps(document, indent=1))
        print(" ".join(f"{key}={_text(value)}" for key, value in row.items()), flush=True)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(folder: Path) -> str:
    """Markdown tables of every step in the folder; also written to ``results.md``."""
    parts = ["# Measured on a GPU"]
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if "rows" not in document:  # the tiles of a dry run
            continue
        about = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
        parts += [f"## {path.stem}", ("Dry run: the figures mean nothing. " if document["dry_run"] else "") + about]
        columns = list(dict.fromkeys(key for row in document["rows"] for key in row))
        table = [columns, ["---"] * len(columns)]
        table += [[_text(row.get(column, "")) for column in columns] for row in document["rows"]]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in table))
    text = "\n\n".join(parts) + "\n"
    (folder / "results.md").write_text(text)
    return text
