"""Compiled code depends on the CPU, and templates fuse only with what they read and what reads them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.choices import InductorChoices

from inductor_kernels import compat

ROOT = Path(__file__).parents[2]
COMPILE = """
import torch
import inductor_kernels.lowering
f = lambda x: (x.sin() * x.cos()).softmax(-1)
x = torch.randn(4, 128)
exact = f(x.double())
units = 128 + 16  # the sum of 128 numbers; what is exponentiated is below 1, and errs by less than 4 before and after
assert ((torch.compile(f)(x) - exact).abs() <= units * 2**-24 * exact).all()
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a CPU that has AVX-512")
def test_a_cache_shared_with_another_cpu(tmp_path):
    """Torch alone gives NaN: it takes code written for AVX-512 from the cache and compiles it for AVX2."""
    for capability in ("avx512", "avx2"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("namespace, apart", [("inductor_kernels", True), ("aten", False)])
def test_only_our_templates_keep_to_what_they_read(monkeypatch, namespace, apart):
    monkeypatch.setattr(compat, "_can_fuse_horizontal", lambda *_: True)
    origin = SimpleNamespace(target=SimpleNamespace(namespace=namespace))
    template = SimpleNamespace(get_template_node=lambda: SimpleNamespace(origins=[origin]))
    pointwise = SimpleNamespace(get_template_node=lambda: None)
    for pair in ((template, pointwise), (pointwise, template)):
        assert InductorChoices.can_fuse_horizontal(None, *pair, 0) is not apart
    assert InductorChoices.can_fuse_horizontal(None, pointwise, pointwise, 0)
