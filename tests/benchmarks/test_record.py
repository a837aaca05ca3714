"""The command that a file of results records."""

from __future__ import annotations

import pytest

from benchmarks import record


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([], ""),
        (["--prompts", "64", "--work", "elsewhere", "--only", "a b"], " --prompts 64 --only 'a b'"),
        (["--work=elsewhere", "--whole"], " --whole"),
        (["--whole", "--out", "x", "--work", "y"], " --whole"),
    ],
)
def test_places_are_left_out(monkeypatch, given, kept):
    monkeypatch.setattr("sys.argv", ["anything", *given])
    assert record.command("benchmarks.search") == "python -m benchmarks.search" + kept
