"""Pages of a mapped file are dropped and come back with what they held."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixdq_ao.quantize.heap import page_out


def mapped() -> int:
    """Bytes of this process that are pages of files."""
    found = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the pages")
def test_pages_are_dropped_and_come_back(tmp_path):
    kept = torch.randn(4 << 20)
    save_file({"weight": kept, "other": torch.ones(3)}, tmp_path / "w.safetensors")
    weight = load_file(tmp_path / "w.safetensors")["weight"]
    assert torch.equal(weight, kept)
    before = mapped()
    page_out(weight)
    if mapped() > before - (1 << 20):
        pytest.skip("this kernel or file system keeps the pages")
    assert mapped() < before - 0.9 * 4 * kept.numel()
    assert torch.equal(weight, kept)


def test_memory_that_is_no_file_stays():
    weight = torch.arange(100_000)
    page_out(weight)
    page_out(weight[1:3])
    page_out(weight.view(100, 1000).T)
    page_out(torch.empty(0))
    page_out(torch.empty(10, device="meta"))
    assert torch.equal(weight, torch.arange(100_000))
