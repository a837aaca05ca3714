"""Freed memory is given back from time to time while weights are quantized, and pages of mapped files are dropped."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixdq_ao.quantize import heap
from mixdq_ao.quantize.heap import page_out
from mixdq_ao.quantize.quantizer import quantize_weight


def test_once_for_so_many_bytes_of_weights(monkeypatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: given.append)
    monkeypatch.setattr(heap, "EVERY", 1000)
    monkeypatch.setattr(heap, "_seen", 0)
    for _ in range(10):
        quantize_weight(torch.ones(10, 10), 4)  # 400 bytes
    assert given == [0] * 3


def test_where_there_is_no_such_function(monkeypatch) -> None:
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    monkeypatch.setattr(heap, "_madvise", lambda: None)
    monkeypatch.setattr(heap, "EVERY", 1)
    assert quantize_weight(torch.ones(2, 2), 8).codes.tolist() == [[127, 127]] * 2
    page_out(torch.ones(10_000))


def mapped() -> int:
    """Resident bytes of this process in mapped files."""
    found = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the pages")
def test_pages_are_dropped_and_come_back(tmp_path) -> None:
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


def test_memory_that_is_no_file_stays() -> None:
    weight = torch.arange(100_000)
    page_out(weight)
    page_out(weight[1:3])
    page_out(weight.view(100, 1000).T)
    page_out(torch.empty(0))
    page_out(torch.empty(10, device="meta"))
    assert torch.equal(weight, torch.arange(100_000))
