"""Freed memory is given back from time to time while weights are quantized."""

from __future__ import annotations

import torch

from mixdq_ao.quantize import heap
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
    monkeypatch.setattr(heap, "EVERY", 1)
    assert quantize_weight(torch.ones(2, 2), 8).codes.tolist() == [[127, 127]] * 2
