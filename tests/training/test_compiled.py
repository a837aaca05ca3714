"""The compiled step: one kernel, compiled once for all sizes, and the same numbers but for torch's square roots."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from mixdq_ao import MemoryEfficientAdamW, MemoryEfficientSGD
from mixdq_ao.training.split import join, split
from mixdq_ao.training.update import compiled_kernel

from .models import BF16, FP16, ExactRoots, awkward, batches, give_gradients, same_bits, tied, wide

STEPS, ROOT = 60, Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run() -> SimpleNamespace:
    """Compiled AdamW, torch's, and torch's with exact roots, on the same gradients."""
    models = [nn.ParameterList(awkward()) for _ in range(3)]
    ours = MemoryEfficientAdamW.from_fp32(models[0], lr=1e-3, compile=True)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1e-3, foreach=False)
    exact = ExactRoots(models[2].parameters(), lr=1e-3)
    code: list[str] = []

    def step() -> None:
        give_gradients(models[0].parameters(), models[1].parameters())
        for p, q in zip(models[1].parameters(), models[2].parameters(), strict=True):
            q.grad = p.grad
        ours.step()
        theirs.step()
        exact.step()

    torch._dynamo.utils.counters.clear()
    _, code = run_and_get_code(step)
    for _ in range(STEPS - 1):
        step()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return SimpleNamespace(models=models, ours=ours, theirs=theirs, exact=exact, code=code, graphs=graphs)


def test_one_kernel_for_all_sizes_and_steps(run):
    """All tensors of more than one element, whatever their shape, and all steps: one graph, in it one kernel."""
    assert run.graphs == 1 and len(run.code) == 1
    kernels = re.findall(r"async_compile\.(?:cpp|triton)\w*\(", run.code[0])
    assert len(kernels) == 1, kernels
    calls = re.findall(r"^\s+cpp_fused\w*\(", run.code[0], re.MULTILINE)
    assert len(calls) == 1 and "extern_kernels." not in run.code[0].split("def call")[1]


def test_bit_for_bit_but_for_the_square_roots(run):
    """Skips parameters of one element: those step eagerly."""
    ours, _, exact = run.models
    pairs = [(p, q) for p, q in zip(ours, exact, strict=True) if p.numel() > 1]
    assert len(pairs) == 4
    for p, q in pairs:
        assert same_bits(run.ours.fp32(p), q)


def test_moments_are_torchs_to_the_bit_and_parameters_within_the_roots_error(run):
    """A root that is off by one unit in the last place moves an update by at most a part in 2^21 in all its roundings.

    A step moves a weight by at most lr / (1 - beta1) here; besides, each step may round to the next float32.
    """
    ours, theirs, _ = run.models
    for p, q in zip(ours, theirs, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert same_bits(run.ours.state[p][name], run.theirs.state[q][name])
        unit = 2.0**-23 * q.abs().double().clamp(min=1e-38)
        off = (run.ours.fp32(p).double() - q.double()).abs()
        assert (off[q.isfinite()] <= (STEPS * (unit + 1e-3 * 10 * 2.0**-21))[q.isfinite()]).all()


def test_sgd_is_torchs_to_the_bit():
    models = [nn.ParameterList(awkward()) for _ in range(2)]
    options = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.01}
    ours = MemoryEfficientSGD.from_fp32(models[0], compile=True, **options)
    theirs = torch.optim.SGD(models[1].parameters(), foreach=False, **options)
    for _ in range(20):
        give_gradients(models[0].parameters(), models[1].parameters())
        ours.step()
        theirs.step()
    assert all(same_bits(ours.fp32(p), q) for p, q in zip(*models, strict=True))


def test_float16_keeps_its_remainder_to_the_bit():
    """SGD on float16 parameters of every size of value, against the eager steps: bits, remainders and momentum."""
    start = torch.randn(37, 41) * 10.0 ** torch.randint(-9, 4, (37, 41))
    start[0, :4] = torch.tensor([0.0, -0.0, 65519.0, 1.00048828125])
    found = []
    for compile in (False, True):
        model = nn.ParameterList([nn.Parameter(start.clone())])
        optimizer = MemoryEfficientSGD.from_fp32(model, FP16, lr=1e-2, momentum=0.9, compile=compile)
        torch.manual_seed(1)
        for _ in range(20):
            model[0].grad = wide(start.shape, FP16)
            optimizer.step()
        found.append((model[0], optimizer.state[model[0]]))
    (p, eager), (q, compiled) = found
    assert same_bits(p, q) and same_bits(eager["momentum_buffer"], compiled["momentum_buffer"])
    assert torch.equal(eager["float16_remainder"], compiled["float16_remainder"])
    assert compiled["float16_remainder"].unique().numel() > 1000


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_pairs_compile_to_the_same_bits(dtype):
    """All exponents and signs with the rounding cases around float16's and bfloat16's halves, infinities and NaN."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (upper[:, None] | lower.to(torch.int32)).flatten().view(torch.float32)
    visible, remainder = split(x, dtype)
    compiled = torch.compile(split, fullgraph=True)(x, dtype)
    assert same_bits(compiled[0], visible) and torch.equal(compiled[1], remainder)
    assert same_bits(torch.compile(join, fullgraph=True)(visible, remainder), join(visible, remainder))


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_small_moments_compile_to_the_same(moments):
    """Dithered moments to the bit; in blocks of 8 bits, rarely, to the next code."""
    start = torch.randn(8192)
    held = []
    for compile in (False, True):
        model = nn.ParameterList([nn.Parameter(start.clone())])
        optimizer = MemoryEfficientAdamW.from_fp32(model, compile=compile, moments=moments)
        torch.manual_seed(1)
        for _ in range(5):
            model[0].grad = torch.randn(8192).to(BF16)
            optimizer.step()
        held.append([optimizer.state[model[0]][name] for name in ("exp_avg", "exp_avg_sq")])
    for eager, compiled in zip(*held, strict=True):
        if moments == "bfloat16":
            assert same_bits(eager, compiled)
        else:
            assert (eager.codes.int() - compiled.codes.int()).abs().max() <= 1
            assert (eager.codes != compiled.codes).float().mean() < 0.01


def test_inside_backward():
    """The kernel is called from autograd's hooks; compared with the eager steps to the roots' error."""
    found = []
    for compile in (False, True):
        model = tied()
        optimizer = MemoryEfficientAdamW(model.parameters(), lr=1e-2, compile=compile)
        optimizer.attach(model)
        for words in batches(3):
            model.loss(words).backward()
            optimizer.step()
        found.append([optimizer.fp32(p) for p in model.parameters()])
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(*found, strict=True))
    assert compiled_kernel() is compiled_kernel()


def test_the_kernel_for_gpus_gives_the_same_bits():
    """Inductor's Triton, executed by Triton's interpreter; see ``interpreted_step.py``."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.training.interpreted_step"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
