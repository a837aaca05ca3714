"""Quality, bytes and seconds of other quantizers beside ours, on the bundled pipeline.

    python -m benchmarks.peers [--only TEXT ...] [--prompts 128] [--work out/peers]

Every contender quantizes a copy of the full-precision UNet; captions that nothing saw are drawn at 1 and 4 steps from
the same noise and compared with full precision. Beside each peer stands our best plan that holds no more bytes, of
those that quantize activations where the peer does. Eager latency: a call with 32 captions and one of float32's in
turn, as times float32. Call: the most memory that such a call takes beyond the weights. Seconds: of one core, all that
comes before the first picture (calibration, search, quantization). A row that fails says why. Writes
benchmarks/results/peers.json and peers.md; finished rows are kept in --work and not measured again.
``python -m benchmarks.peers.latency`` has compiled latencies.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixdq_ao import Plan
from mixdq_ao.app.environment import environment
from mixdq_ao.app.measure import rounds_of, speedup
from mixdq_ao.jsonfile import write_document

from .. import record
from ..held import model_bytes
from ..memory import Peak
from .contenders import PEERS, Contender
from .kept import Row, Rows
from .ours import Ours
from .published import Published
from .subject import Subject, latency_inputs, simulated_bytes
from .tables import behind, cells, table

RESULTS = Path(__file__).parents[1] / "results"
ROUNDS, BATCH = 7, 32
OURS = (  # what the row says, average bits of weights, of activations (the best of these)
    ("", (2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0), (8,)),
    (", sensitive activations in 16 bits", (3.0, 4.0, 5.0, 6.0, 8.0), (8.05, 8.1, 8.25, 8.5)),
    (", weights only", (2.5, 3.0, 4.0, 6.0, 8.0), (16,)),
)
PUBLISHED_BITS = (3.0, 4.0, 5.0, 6.0, 8.0)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def give_back_freed_memory() -> None:
    """Tells glibc to map blocks of 64 KiB and more, so that freed ones leave the process and peaks mean something."""
    libc = ctypes.CDLL(None)
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(parameter, 1 << 16)


def measured(subject: Subject, unet: nn.Module, size: int, inputs: dict[str, Any]) -> Row:
    """Pictures, bytes, the time of a call beside the full-precision model's, and the memory it takes."""
    pictures = subject.grade(unet)
    full = subject.pipe.unet
    times = rounds_of({"full": lambda: full(**inputs), "it": lambda: unet(**inputs)}, rounds=ROUNDS)
    with Peak() as peak:
        unet(**inputs)
    figures = {"latency_ms": statistics.median(times["it"]), "speedup": speedup(times["full"], times["it"])}
    return {"bytes": size, "pictures": pictures, "call_peak": peak.bytes} | figures


def peer(subject: Subject, contender: Contender, inputs: dict[str, Any]) -> Row:
    start = time.process_time()
    unet = contender.quantize(copy.deepcopy(subject.pipe.unet), subject)
    seconds = time.process_time() - start
    size = model_bytes(unet) if contender.stored else simulated_bytes(unet)
    with torch.no_grad():
        return {"seconds": seconds, "does": contender.does} | measured(subject, unet, size, inputs)


def planned(subject: Subject, method: Ours | Published, make: Callable[[], Plan], inputs: dict[str, Any]) -> Row:
    start = time.process_time()
    plan = make()
    unet = method.quantize(copy.deepcopy(subject.pipe.unet), plan)
    seconds = time.process_time() - start + method.seconds
    bits = plan.summary(subject.pipe.unet).average_weight_bits
    integers = any(layer.act_bits < 16 for layer in plan.layers.values())
    does = "linear, convolution, " + ("activations, mixed bits" if integers else "mixed bits")
    with torch.no_grad():
        figures = measured(subject, unet, model_bytes(unet), inputs)
    return {"seconds": seconds, "average_weight_bits": bits, "does": does} | figures


def full_precision(subject: Subject, inputs: dict[str, Any]) -> Row:
    unet = subject.pipe.unet
    return {"seconds": 0.0, "does": ""} | measured(subject, unet, model_bytes(unet), inputs)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def all_rows(subject: Subject, rows: Rows, wanted: Callable[[str], bool], work: Path) -> dict[str, Row]:
    inputs = latency_inputs(subject, BATCH)
    shown: dict[str, Row] = {}

    def row(name: str, measure: Callable[[], Row]) -> None:
        if wanted(name):
            shown[name] = rows(name, measure)

    with torch.no_grad():
        row("float32", lambda: full_precision(subject, inputs))
    for contender in PEERS:
        if installed(contender.package) is None:
            shown[contender.name] = {"error": f"{contender.package} is not installed"}
        else:
            row(contender.name, lambda c=contender: peer(subject, c, inputs))
    method = Ours(subject, work)
    if wanted("MixDQ as published"):
        published = Published(subject, method.calibration, work)
        for bits in PUBLISHED_BITS:
            name = f"MixDQ as published, {bits:g} bits"
            row(name, lambda b=bits: planned(subject, published, lambda: published.plan(b), inputs))
    for kind, budgets, act_bits in OURS:
        for bits in budgets:
            make = lambda b=bits, a=act_bits: method.plan(b, a)  # noqa: E731
            row(f"ours, {bits:g} bits{kind}", lambda make=make: planned(subject, method, make, inputs))
    return shown


def verdict(rows: dict[str, Row]) -> str:
    better = ", ".join(behind(rows)) or "none of them"
    said = f"Better at 4 steps than every plan of ours of their kind and at most their bytes: {better}."
    return f"{said} What does not take part: {', '.join(n for n, r in rows.items() if 'error' in r) or 'none'}."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose name has one of these in it")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path("out/peers"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    give_back_freed_memory()
    subject = Subject(options.prompts)
    rows = Rows(options.work / f"rows_{options.prompts}.json", lambda n, r: print(n, cells(r), flush=True))
    shown = all_rows(subject, rows, lambda name: any(text in name for text in options.only), options.work)
    packages = sorted({c.package for c in PEERS})
    document = {
        "command": record.command("benchmarks.peers"),
        "rows": shown,
        "peers": {package: installed(package) for package in packages},
        "environment": environment() | {"prompts": options.prompts, "latency_batch": BATCH},
    }
    write_document(options.out / "peers.json", document)
    e = document["environment"]
    where = f"{options.prompts} captions; {e['processor']}, {e['threads']} threads, commit {e['commit']}; " + ", ".join(
        f"{name} {found or 'not installed'}" for name, found in document["peers"].items()
    )
    text = "\n\n".join([(__doc__ or "").strip(), verdict(shown), table(shown), where])
    (options.out / "peers.md").write_text(text + "\n", encoding="utf-8")
    print(table(shown))


if __name__ == "__main__":
    main()
