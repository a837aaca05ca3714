"""What torch.compile would run for SDXL's whole UNet on a GPU, read from the code it generates: no GPU is needed.

    python -m benchmarks.lowering [--pixels 512 1024] [--weight-bits 8 4] [--arch sm_90] [--apart] [--tiny]

Full size (2.57 billion weights, on the meta device), batch 1, one denoising step, every layer with 8-bit activations,
text rows and split shortcuts as in a real plan, projections fused unless ``--apart``. Takes four minutes a row,
which is added to benchmarks/results/lowering.json and lowering.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inductor_kernels import testing
from mixdq_ao.app.environment import environment
from mixdq_ao.jsonfile import write_document
from mixdq_ao.models.fused_projections import fuse_projections
from mixdq_ao.models.fused_text import fuse_text_projections
from mixdq_ao.quantize.tensor import MixDQTensor, SplitMixDQTensor

from . import record
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
def generated(weight_bits: int, pixels: int, arch: str, *, tiny: bool, apart: bool = False) -> str:
    """The generated code for one step of the quantized UNet in float16."""
    unet = subject.quantized(subject.build(dry=tiny, device="meta", dtype=torch.float16), weight_bits)
    if not apart:
        fuse_projections(unet)
        fuse_text_projections(unet)
    _tie(unet)
    call = subject.inputs(unet, pixels, 1, "meta", torch.float16)
    added = call["added_cond_kwargs"]
    texts = call["encoder_hidden_states"], added["text_embeds"], added["time_ids"]
    return testing.cuda_code(Step(unet), call["sample"], call["timestep"], *texts, arch=arch)


def _tie(unet: nn.Module) -> None:
    """Shares scales and zero points between layers that read the same tensor, as is done by value off meta devices."""
    first: dict[tuple[str, str], Tensor] = {}
    for name, layer in unet.named_modules():
        weight = getattr(layer, "weight", None)
        halves = (weight.first, weight.second) if isinstance(weight, SplitMixDQTensor) else (weight,)
        for half, part in enumerate(halves):
            if isinstance(part, MixDQTensor):
                held = part.stored_tensors()
                for shared in part.shared_tensors:
                    if shared in held:
                        of = "text" if shared == "bos_embedding" else f"{subject.input_of(name)} {half}"
                        setattr(part, shared, first.setdefault((shared, of), held[shared]))


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
        reads = re.search(r"'(arg_A|in_out_ptr|in_ptr)\d*':", source)  # not so: rows of zero points for convolutions
        writes = len(re.findall(r"'\w*out_ptr\d+': '\*i8'", source)) if reads else 0
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
        "read on the host": len(re.findall(r"\.item\(|\.cpu\(|device='cpu'|_local_scalar_dense", body)),
        "largest": _largest(body),
    }


def _only_quantizes(source: str) -> bool:
    """Whether a pointwise kernel reads one tensor besides its scale and zero point and writes only codes: no other
    work to share a launch with, as after attention."""
    kernel = source.partition("@triton.jit")[2]
    signature = re.search(r"def \w+\((.*?)\):", kernel)
    pointers = re.findall(r"\w*(in_out_ptr|out_ptr|in_ptr)\d+", signature[1] if signature else "")
    plain = not re.search(r"tl_math|libdevice\.(?!nearbyint|rint)|sigmoid", kernel)
    return plain and "'*i8'" in source and 1 <= pointers.count("in_ptr") <= 3 and pointers.count("out_ptr") == 1


def _largest(body: str) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], int] = {}
    for _, shape, dtype in ALLOCATION.findall(body):
        sizes = [int(size) for size in shape.split(",") if size.strip()]
        found[shape.strip(", "), dtype] = math.prod(sizes) * getattr(torch, dtype).itemsize
    largest = sorted(found.items(), key=lambda item: -item[1])[:SHOWN]
    return [{"shape": shape, "dtype": dtype, "bytes": size} for (shape, dtype), size in largest]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    titles = "pixels|weights|arch|projections|products|pointwise|norms, sums|attention|quantizes: in a norm"
    titles += "|behind a product"
    titles += "|in front of a product|in pointwise work|of these alone|reads on the host|largest tensor"
    head = [f"| {titles.replace('|', ' | ')} |", "|" + "---|" * (titles.count("|") + 1)]
    for row in rows:
        n, q, top = row["launches"], row["quantizes"], row["largest"][0]
        cells = [row["pixels"], row["weight_bits"], row["arch"], row["projections"], n.get("tem", 0), n.get("poi", 0)]
        cells += [n.get("red", 0) + n.get("per", 0), sum(row["calls"].values()), q.get("in a norm", 0)]
        cells += [
            q.get(k, 0) for k in ("behind the product before", "in front of the product", "in pointwise work", "alone")
        ]
        cells.append(row["read on the host"])
        cells.append(f"{top['shape']} {top['dtype']}, {top['bytes'] / 2**20:.0f} MiB")
        head.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(head)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--weight-bits", type=int, nargs="+", choices=(2, 4, 8), default=[8, 4])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--apart", action="store_true", help="do not fuse projections")
    parser.add_argument("--tiny", action="store_true", help="a UNet of the same layout in seconds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    how = "apart" if options.apart else "fused"
    for pixels in options.pixels:
        for bits in options.weight_bits:
            start = time.perf_counter()
            found = read(generated(bits, pixels, options.arch, tiny=options.tiny, apart=options.apart))
            about = {"pixels": pixels, "weight_bits": bits, "arch": options.arch, "projections": how}
            row = about | found | {"seconds": time.perf_counter() - start, "environment": environment()}
            _add(options.out, row, tuple(about), tiny=options.tiny)
            print(table([row]), flush=True)


def _add(folder: Path, row: dict[str, Any], same: tuple[str, ...], *, tiny: bool) -> None:
    """Adds the row to those of other runs, replacing one of the same kind."""
    path = folder / "lowering.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [r for r in known if any(r[k] != row[k] for k in same)] + [row]
    rows.sort(key=lambda r: [str(r[k]).zfill(5) for k in ("pixels", "projections")] + [-r["weight_bits"]])
    write_document(path, {"command": record.command("benchmarks.lowering"), "tiny": tiny, "rows": rows})
    text = "# SDXL's UNet lowered to GPU code\n\n`python -m benchmarks.lowering`; launches of one step. "
    text += "Projections fused: query, key and value as one product, keys and values of the text as one.\n\n"
    (folder / "lowering.md").write_text(text + table(rows) + "\n")


if __name__ == "__main__":
    main()
