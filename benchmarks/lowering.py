"""What torch.compile would run for SDXL's whole UNet on a GPU, read from the code it generates: no GPU is needed.

    python -m benchmarks.lowering [--pixels 512 1024] [--weight-bits 8 4] [--arch sm_90] [--tiny]

Full size (2.57 billion weights, on the meta device), batch 1, one denoising step, every layer with 8-bit activations,
text rows and split shortcuts as in a real plan. Takes two to four minutes a row. Writes
benchmarks/results/lowering.json and lowering.md.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inductor_kernels import testing
from mixdq_ao.app.environment import environment
from mixdq_ao.jsonfile import write_document

from .gpu import unet as subject

RESULTS = Path(__file__).parent / "results"
ALLOCATION = re.compile(r"(\w+) = empty_strided_cuda\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)")
SHOWN = 5


class Step(nn.Module):
    """One call of a UNet with its tensors as plain arguments."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, ids: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": ids}
        return self.unet(sample, timestep, text, added_cond_kwargs=added, return_dict=False)[0]


@torch.no_grad()
def generated(weight_bits: int, pixels: int, arch: str, *, tiny: bool) -> str:
    """The code for one step of the quantized UNet in float16."""
    unet = subject.quantized(subject.build(dry=tiny, device="meta", dtype=torch.float16), weight_bits)
    call = subject.inputs(unet, pixels, 1, "meta", torch.float16)
    added = call["added_cond_kwargs"]
    texts = call["encoder_hidden_states"], added["text_embeds"], added["time_ids"]
    return testing.cuda_code(Step(unet), call["sample"], call["timestep"], *texts, arch=arch)


def read(code: str) -> dict[str, Any]:
    """Launches by kind, what happened to the quantizes, and the largest tensors between kernels."""
    sources = testing.kernels(code)
    body = code.rpartition("async_compile.wait")[2]
    launches = Counter(re.findall(r"(triton_\w+)\.run\(", body))
    kinds: Counter[str] = Counter()
    quantizes: Counter[str] = Counter()
    for name, count in launches.items():
        kind, source = name.split("_")[1], sources[name]
        kinds[kind] += count
        writes = len(re.findall(r"'\w*out_ptr\d+': '\*i8'", source))
        if kind == "tem":
            in_front = "arg_A" not in source.partition("@triton.jit")[2]
            quantizes["in front of the product"] += count * in_front
        where = {"tem": "behind the product before", "poi": "in pointwise work"}.get(kind, "in a norm")
        quantizes[where] += count * writes
    copies = [n for n, source in sources.items() if n.split("_")[1] == "poi" and _only_quantizes(source)]
    called = Counter(re.findall(r"= (torch\.ops\.[\w.]+|extern_kernels\.\w+)\(", body))
    return {
        "launches": dict(kinds),
        "kernels": len(sources),
        "quantizes": dict(quantizes) | {"alone": sum(launches[n] for n in copies)},
        "calls": dict(called),
        "largest": _largest(body),
    }


def _only_quantizes(source: str) -> bool:
    """Whether a pointwise kernel reads one tensor besides its scale and zero point and writes only codes: no other
    work to share a launch with, as after attention."""
    kernel = source.partition("@triton.jit")[2]
    signature = re.search(r"def \w+\((.*?)\):", kernel)
    pointers = re.findall(r"\w*(in_out_ptr|out_ptr|in_ptr)\d+", signature[1] if signature else "")
    plain = not re.search(r"tl_math|libdevice\.(?!nearbyint|rint)|sigmoid", kernel)
    return plain and "'*i8'" in source and pointers.count("in_ptr") <= 3 and pointers.count("out_ptr") == 1


def _largest(body: str) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], int] = {}
    for _, shape, dtype in ALLOCATION.findall(body):
        sizes = [int(size) for size in shape.split(",") if size.strip()]
        found[shape.strip(", "), dtype] = math.prod(sizes) * getattr(torch, dtype).itemsize
    largest = sorted(found.items(), key=lambda item: -item[1])[:SHOWN]
    return [{"shape": shape, "dtype": dtype, "bytes": size} for (shape, dtype), size in largest]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    titles = "pixels|weights|arch|products|pointwise|norms, sums|attention|quantizes: in a norm|behind a product"
    titles += "|in front of a product|in pointwise work|of these alone|largest tensor"
    head = [f"| {titles.replace('|', ' | ')} |", "|" + "---|" * (titles.count("|") + 1)]
    for row in rows:
        n, q, top = row["launches"], row["quantizes"], row["largest"][0]
        cells = [row["pixels"], row["weight_bits"], row["arch"], n.get("tem", 0), n.get("poi", 0)]
        cells += [n.get("red", 0) + n.get("per", 0), sum(row["calls"].values()), q.get("in a norm", 0)]
        cells += [q[k] for k in ("behind the product before", "in front of the product", "in pointwise work", "alone")]
        cells.append(f"{top['shape']} {top['dtype']}, {top['bytes'] / 2**20:.0f} MiB")
        head.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(head)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--weight-bits", type=int, nargs="+", choices=(2, 4, 8), default=[8, 4])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--tiny", action="store_true", help="a UNet of the same layout in seconds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    command = shlex.join(["python", "-m", "benchmarks.lowering", *sys.argv[1:]])
    for pixels in options.pixels:
        for bits in options.weight_bits:
            start = time.perf_counter()
            found = read(generated(bits, pixels, options.arch, tiny=options.tiny))
            about = {"pixels": pixels, "weight_bits": bits, "arch": options.arch}
            rows.append(about | found | {"seconds": time.perf_counter() - start})
            document = {"command": command, "tiny": options.tiny, "rows": rows, "environment": environment()}
            write_document(options.out / "lowering.json", document)
            page = f"# SDXL's UNet lowered to GPU code\n\n`{command}`\n\nLaunches of one step.\n\n{table(rows)}\n"
            (options.out / "lowering.md").write_text(page)
            print(table(rows[-1:]), flush=True)


if __name__ == "__main__":
    main()
