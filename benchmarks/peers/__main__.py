"""Quality, bytes and seconds of other quantizers and of ours at the same bytes, on the bundled pipeline.

    python -m benchmarks.peers [--only TEXT ...] [--prompts 256] [--work out/peers]

Every contender quantizes a copy of the full-precision UNet; 256 captions that nothing saw are drawn at 1 and 4 steps
from the same noise. After each peer our plan with at most as many bytes. Latencies: one eager call with 32 captions,
all contenders in turn, as times float32. A row that fails says why. Writes benchmarks/results/peers.json and peers.md;
finished rows are kept in --work and not measured again.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import shlex
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixdq_ao.app.environment import environment
from mixdq_ao.app.measure import rounds_of, speedup
from mixdq_ao.jsonfile import write_document

from ..held import model_bytes
from .contenders import PEERS, Contender
from .ours import Ours
from .subject import Subject, estimated_bytes, latency_inputs

RESULTS = Path(__file__).parents[1] / "results"
ROUNDS, BATCH = 7, 32


def measured(subject: Subject, unet: nn.Module, size: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Pictures, bytes, and the time of a call beside the full-precision model's."""
    pictures = subject.grade(unet)
    full = subject.pipe.unet
    times = rounds_of({"full": lambda: full(**inputs), "it": lambda: unet(**inputs)}, rounds=ROUNDS)
    ratio = speedup(times["full"], times["it"])
    return {"bytes": size, "pictures": pictures, "latency_ms": statistics.median(times["it"]), "speedup": ratio}


def peer(subject: Subject, contender: Contender, inputs: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    unet = contender.quantize(copy.deepcopy(subject.pipe.unet), subject)
    seconds = time.perf_counter() - start
    size = model_bytes(unet) if contender.stored else estimated_bytes(subject.pipe.unet, contender.bits or 32)
    with torch.no_grad():
        return {"seconds": seconds} | measured(subject, unet, size, inputs)


def ours(subject: Subject, method: Ours, size: int, inputs: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    plan = method.plan(size)
    unet = method.quantize(copy.deepcopy(subject.pipe.unet), plan)
    seconds = time.perf_counter() - start + method.seconds
    bits = plan.summary(subject.pipe.unet).average_weight_bits
    return {"seconds": seconds, "average_weight_bits": bits} | measured(subject, unet, model_bytes(unet), inputs)


class Rows:
    """Finished rows by name, in a file after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, name: str, measure: Any) -> dict[str, Any]:
        if name not in self.rows:
            try:
                row = measure()
            except Exception as error:  # a contender that fails is a result
                row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
            self.rows[name] = row
            write_document(self.path, self.rows)
            print(name, line(row), flush=True)
            gc.collect()
        return self.rows[name]


def line(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["error"]]
    cells = [f"{row['bytes'] / 2**20:.2f}"]
    for steps in ("1", "4"):
        p = row["pictures"][steps]
        cells += [f"{p['agreement']:.1%}", "-" if p["psnr"] is None else f"{p['psnr']:.1f}"]
    p = row["pictures"]["4"]
    return [*cells, f"{p['ssim']:.4f}", f"{p['frechet']:.2f}", f"{row['speedup']:.2f}", f"{row['seconds']:.0f}"]


def table(rows: dict[str, dict[str, Any]]) -> str:
    titles = "MiB|agreement, 1 step|PSNR dB|agreement, 4 steps|PSNR dB|SSIM|Fréchet|eager, times float32|seconds"
    head = ["| contender | " + titles.replace("|", " | ") + " |", "|" + "---|" * (titles.count("|") + 2)]
    columns = titles.count("|") + 1
    for name, row in rows.items():
        cells = line(row) + [""] * (columns - len(line(row)))
        bold = "**" if name.startswith("ours") else ""
        head.append(f"| {bold}{name}{bold} | " + " | ".join(cells) + " |")
    return "\n".join(head)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose name has one of these in it")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("out/peers"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    subject, rows = Subject(options.prompts), Rows(options.work / f"rows_{options.prompts}.json")
    inputs, method = latency_inputs(subject, BATCH), Ours(subject, options.work / "analysis.jsonl")
    shown: dict[str, dict[str, Any]] = {}
    for contender in PEERS:
        if not any(text in contender.name for text in options.only):
            continue
        if installed(contender.package) is None:
            shown[contender.name] = {"error": f"{contender.package} is not installed"}
            continue
        found = shown[contender.name] = rows(contender.name, lambda c=contender: peer(subject, c, inputs))
        if "error" not in found:
            size = found["bytes"]
            name = f"ours, {size / 2**20:.2f} MiB"
            shown[name] = rows(name, lambda size=size: ours(subject, method, size, inputs))
    packages = sorted({c.package for c in PEERS})
    write_document(
        options.out / "peers.json",
        {
            "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
            "rows": shown,
            "peers": {package: installed(package) for package in packages},
            "full": {"bytes": model_bytes(subject.pipe.unet)},
            "environment": environment() | {"prompts": options.prompts, "latency_batch": BATCH},
        },
    )
    (options.out / "peers.md").write_text(f"{(__doc__ or '').strip()}\n\n{table(shown)}\n")
    print(table(shown))


if __name__ == "__main__":
    main()
