"""SDXL's UNet with random weights, one step end to end: how long, how much memory, what is left unfused."""

import dataclasses
import gc
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from ..held import model_bytes
from ..layouts import SDXL, TINY
from .results import failure
from .timing import interleaved, on_host


def build(*, dry: bool, device: str, dtype: torch.dtype) -> nn.Module:
    """SDXL's UNet (2.57 billion random weights), made on the device."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**(TINY if dry else SDXL))
    return unet.to(dtype).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def inputs(unet, pixels: int, batch: int, device: str, dtype: torch.dtype) -> dict:
    size, config = pixels // 8, unet.config
    ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=device, dtype=dtype).repeat(batch, 1)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return dict(
        sample=torch.randn(batch, 4, size, size, device=device, dtype=dtype),
        timestep=torch.tensor(500, device=device),
        encoder_hidden_states=torch.randn(batch, 77, config.cross_attention_dim, device=device, dtype=dtype),
        added_cond_kwargs={"text_embeds": torch.randn(batch, pooled, device=device, dtype=dtype), "time_ids": ids},
        return_dict=False,
    )


def input_of(name: str) -> str:
    """What a layer reads: the same for layers that read one tensor, as in the plan of a real model."""
    from mixdq_ao.layers import reads_text

    before, _, last = name.rpartition(".")
    if reads_text(name):
        return "text"
    if last == "time_emb_proj":
        return "time"
    return before if last in ("to_q", "to_k", "to_v") else name


def _range(of: str) -> tuple[float, float]:
    """Made up: the time does not depend on it, but each tensor has its own. Layers with equal ranges share tensors,
    and if all did, Inductor would look for fusions between all of them."""
    return -4.0, 4.0 + zlib.crc32(of.encode()) / 2**32


def quantized(unet: nn.Module, weight_bits: int) -> nn.Module:
    """Every layer, text rows and split shortcuts as in a real plan."""
    from mixdq_ao import Plan, mixdq_config, quantize_
    from mixdq_ao.layers import reads_text, split_points

    splits, plan = split_points(unet), Plan.uniform(unet, weight_bits, 8)
    ranged = {
        name: dataclasses.replace(layer, act_range=_range(input_of(name)), bos=reads_text(name))
        for name, layer in plan.layers.items()
    }
    for name, point in splits.items():
        ranged[name] = dataclasses.replace(ranged[name], split=point, split_act_range=_range(f"{name}, second"))
    bos = tuple(torch.linspace(-800, 800, unet.config.cross_attention_dim, device="cpu").tolist())  # type: ignore
    quantize_(unet, mixdq_config(Plan(ranged, bos_embedding=bos)))
    return unet


def _torchao(unet: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(unet, Int8DynamicActivationInt8WeightConfig())
    return unet


def _float8(unet: nn.Module) -> nn.Module:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise RuntimeError("no float8 products on this GPU")
    quantize_(unet, Float8DynamicActivationFloat8WeightConfig())
    return unet


def _fused(unet: nn.Module, weight_bits: int) -> nn.Module:
    """Query, key and value as one product, keys and values of the text as one for the whole UNet."""
    from mixdq_ao.models.fused_projections import fuse_projections
    from mixdq_ao.models.fused_text import fuse_text_projections

    unet = quantized(unet, weight_bits)
    fuse_projections(unet)
    fuse_text_projections(unet)
    return unet


@contextmanager
def own_settings() -> Iterator[None]:
    """torchao's configs set options of Inductor for the whole process, as recommended for them. They hold for its
    variants, not for what is measured afterwards."""
    from torch._inductor import config

    kept = config.save_config()
    try:
        yield
    finally:
        config.load_config(kept)


KINDS = (  # part of a kernel's name, what it is; the first that matches
    ("triton_tem", "templates"), ("triton_poi", "pointwise, unfused"),
    ("triton_red", "norms"), ("triton_per", "norms"),
    ("flash", "attention"), ("fmha", "attention"), ("gemm", "16-bit products"), ("conv", "16-bit products"),
    ("cutlass", "16-bit products"), ("nvjet", "16-bit products"),
)  # fmt: skip

VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {  # ours last: loading our lowering changes what is fused
    "fp16": lambda unet: unet,
    "torchao-int8": _torchao,
    "torchao-float8": _float8,
    "W8A8": lambda unet: _fused(unet, 8),
    "W4A8": lambda unet: _fused(unet, 4),
    "W8A8-apart": lambda unet: quantized(unet, 8),
}


UNGUARDED = {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}
"""Options of torch.compile for every compiled variant: layers of a model that stays as it is are not looked at before
each call, which takes milliseconds (``benchmarks/test_host.py``)."""


def _profile(step: Callable[[], object]) -> dict[str, str | float]:
    """Where the time goes: milliseconds of all kernels, shares of products and of what is not fused into one; the five
    slowest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) or 1
    shares: dict[str, float] = {}
    for event in events:
        kind = next((label for part, label in KINDS if part in event.key), "others")
        shares[kind] = shares.get(kind, 0) + event.self_device_time_total / total
    slowest = (f"{event.key[:40]} {event.self_device_time_total / total:.0%}" for event in events[:5])
    return {
        "device ms": total / 1e3,
        "time by kind": ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(shares.items(), key=lambda s: -s[1])),
        "most time": ", ".join(slowest),
    }


def _measure(name: str, unet: nn.Module, call: dict, mode: str, *, dry: bool) -> dict:
    cuda = not dry
    row: dict = {"variant": f"{name} {mode}"}
    torch._dynamo.reset()
    if mode == "compiled":
        options = {"max_autotune": True, "triton.cudagraphs": True} if cuda else {}
        backend = "inductor" if cuda else "aot_eager"  # code for the CPU would take minutes
        run = torch.compile(unet, fullgraph=True, backend=backend, options=options | UNGUARDED)
    else:
        run = unet
    start = time.perf_counter()
    run(**call)
    row["first call s"] = time.perf_counter() - start
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rounds = 2 if dry else 10
    row["ms"] = interleaved({"step": lambda: run(**call)}, rounds)["step"]
    row["host ms"] = on_host(lambda: run(**call), rounds)
    row["weight bytes"] = model_bytes(unet)
    if cuda:
        row["peak bytes"] = torch.cuda.max_memory_allocated()
        try:
            row |= _profile(lambda: run(**call))
        except Exception as error:  # what was timed counts
            row["profile"] = failure(error)["error"]
    return row


def compare(pixels: int, batch: int, *, dry: bool, only: tuple[str, ...] = ()) -> Iterator[dict]:
    """Eager and compiled fp16, ours, torchao (or fp16 and ``only`` these). A variant that fails is a row that says
    why; one there is not is refused."""
    if unknown := set(only) - set(VARIANTS):
        raise ValueError(f"variants {', '.join(sorted(unknown))}: expected some of {', '.join(VARIANTS)}")
    return _rows(pixels, batch, [name for name in VARIANTS if not only or name in ("fp16", *only)], dry=dry)


def _rows(pixels: int, batch: int, names: list[str], *, dry: bool) -> Iterator[dict]:
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.float16)
    for name in names:
        for mode in ("eager", "compiled") if name == "fp16" else ("compiled",):
            try:
                with own_settings() if name.startswith("torchao") else nullcontext():
                    unet = VARIANTS[name](build(dry=dry, device=device, dtype=dtype))
                    call = inputs(unet, 64 if dry else pixels, batch, device, dtype)
                    row = _measure(name, unet, call, mode, dry=dry)
            except Exception as error:
                row = {"variant": f"{name} {mode}"} | failure(error)
            yield row
            unet = call = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
