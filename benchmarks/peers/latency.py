"""Compiled latency of other quantizers' UNets beside ours: python -m benchmarks.peers.latency [--whole]

Each contender's repeated blocks are compiled (diffusers' ``compile_repeated_blocks(fullgraph=True)``), with --whole the
whole UNet (minutes each; PT2E's graph, with its weights frozen, only then). A call with 32 captions of each in turn
within one process, as times compiled float32, with 95 % intervals. First: seconds to the end of the first call, which
compiles or finds code in Inductor's cache. A contender that does not compile says why. Writes
benchmarks/results/peers_latency.json and .md, with --whole peers_latency_whole.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import nn

from mixdq_ao import Plan, mixdq_config, quantize_
from mixdq_ao.app.environment import environment
from mixdq_ao.app.measure import rounds_of
from mixdq_ao.jsonfile import write_document
from mixdq_ao.search.roundings import PLAIN, rounded_as

from .. import record
from ..turns import speedup
from .contenders import PEERS
from .ours import Ours
from .subject import Subject, latency_inputs

RESULTS = Path(__file__).parents[1] / "results"
BATCH, ROUNDS, CAPTIONS = 32, 15, 32
TIMED = (
    "PyTorch PT2E, X86InductorQuantizer",
    "torchao int8 dynamic",
    "torchao int8 weights",
    "SDNQ int8, int8 products",
)
OURS = (8.0, 4.0)
Call = Callable[[], Any]


def contenders(subject: Subject, work: Path) -> dict[str, Callable[[], nn.Module]]:
    """What makes each UNet, float32 first."""
    found: dict[str, Callable[[], nn.Module]] = {"float32": lambda: subject.pipe.unet}
    fresh = lambda: copy.deepcopy(subject.pipe.unet)  # noqa: E731
    for bits in OURS:
        found[f"ours, {bits:g} bits"] = lambda b=bits: ours(fresh(), subject, work, b)
    for contender in PEERS:
        if contender.name in TIMED:
            found[contender.name] = lambda c=contender: c.quantize(fresh(), subject)
    return found


def ours(unet: nn.Module, subject: Subject, work: Path, bits: float) -> nn.Module:
    """By a plan kept in ``work``; rounded to nearest, which takes no moments and no other time in a call."""
    path = work / f"plan_{bits:g}.json"
    if not path.exists():
        plan = Ours(subject, work).plan(bits)
        plan.with_layers({n: rounded_as(layer, PLAIN) for n, layer in plan.layers.items()}).save(path)
    quantize_(unet, mixdq_config(Plan.load(path)))
    return unet


def prepared(name: str, unet: Any, inputs: dict[str, Any], whole: bool) -> tuple[Call, float]:
    """A compiled call and the seconds of the first one. Raises where it does not agree with the uncompiled model."""
    expected = unet(**inputs)[0]
    unet = copy.deepcopy(unet)
    unet.compile(fullgraph=True) if whole else unet.compile_repeated_blocks(fullgraph=True)
    freezing = "PT2E" in name

    def call() -> Any:
        with inductor.patch(freezing=freezing):
            return unet(**inputs)[0]

    start = time.perf_counter()
    error = ((call() - expected).norm() / expected.norm()).item()
    seconds = time.perf_counter() - start
    if not error < 0.05:
        raise ValueError(f"compiled and uncompiled differ by {error:.3f}")
    return call, seconds


@torch.no_grad()
def measure(subject: Subject, wanted: Callable[[str], bool], work: Path, whole: bool) -> dict[str, dict[str, Any]]:
    torch._dynamo.config.recompile_limit = 64  # blocks of every contender share their code
    inputs, calls = latency_inputs(subject, BATCH), {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in contenders(subject, work).items():
        if not wanted(name):
            continue
        try:
            calls[name], first = prepared(name, make(), inputs, whole)
        except Exception as error:
            rows[name] = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"}
        else:
            rows[name] = {"first": first}
        print(name, rows[name], flush=True)
    times = rounds_of(calls, rounds=ROUNDS)
    reference = next(iter(times.values()))
    for name, found in times.items():
        rows[name] |= {"ms": statistics.median(found)} | speedup(reference, found)
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| contender | ms | times float32 | first call, s |", "|---|---|---|---|"]
    for name, r in rows.items():
        bold = "**" if name.startswith("ours") else ""
        cells = [r["error"], "", ""] if "error" in r else [
            f"{r['ms']:.0f}", f"{r['speedup']:.2f} [{r['low']:.2f}, {r['high']:.2f}]", f"{r['first']:.0f}"
        ]  # fmt: skip
        lines.append(f"| {bold}{name}{bold} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.latency", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose name has one of these in it")
    parser.add_argument("--whole", action="store_true", help="compile the UNet as one graph")
    parser.add_argument("--work", type=Path, default=Path("out/peers"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = lambda name: any(text in name for text in options.only) and (options.whole or "PT2E" not in name)  # noqa: E731
    rows = measure(Subject(CAPTIONS), wanted, options.work, options.whole)
    e = environment()
    command = record.command("benchmarks.peers.latency")
    document = {"command": command, "rows": rows, "environment": e}
    stem = "peers_latency_whole" if options.whole else "peers_latency"
    write_document(options.out / f"{stem}.json", document)
    machine = f"{e['processor']}, {e['cpu_capability']}, {e['threads']} threads"
    where = f"{machine}, torch {e['packages']['torch']}, commit {e['commit']}"
    text = "\n\n".join([(__doc__ or "").strip(), table(rows), where])
    (options.out / f"{stem}.md").write_text(text + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
