"""What compiled code depends on besides the graph."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMPILE = """
import torch
import inductor_kernels.lowering
f = lambda x: (x.sin() * x.cos()).softmax(-1)
x = torch.randn(4, 128)
torch.testing.assert_close(torch.compile(f)(x), f(x))
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a CPU that has AVX-512")
def test_a_cache_shared_with_another_cpu(tmp_path):
    """Torch alone gives NaN: it takes the code for AVX-512 from the cache and compiles it for AVX2."""
    for capability in ("avx512", "avx2"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
