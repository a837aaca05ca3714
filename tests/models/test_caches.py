"""Compiled code of quantized models is cached across processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compiled_in_a_process(cache: Path, *arguments: str) -> dict:
    """The output of ``tests.models.cache_program``, with its caches in ``cache``."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.models.cache_program", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[dict, Path]:
    """The output of the first process, and its folder of caches and saved artifacts."""
    folder = tmp_path_factory.mktemp("caches")
    return compiled_in_a_process(folder / "cache", "save", str(folder / "artifacts")), folder


def hit(found: dict) -> bool:
    counted = found["counters"]
    return counted.get("autograd_cache_hit") == 1 and not any("miss" in n or "bypass" in n for n in counted)


def test_nothing_keeps_the_first_process_from_storing_its_code(first):
    found = first[0]
    assert not hit(found) and not any("bypass" in n for n in found["counters"])
    assert found["counters"]["fxgraph_cache_miss"] == 1 and found["difference_to_eager"] < 1e-4


def test_a_second_process_compiles_nothing(first):
    found, folder = first
    again = compiled_in_a_process(folder / "cache")
    assert hit(again) and again["difference_to_eager"] == found["difference_to_eager"]


def test_saved_artifacts_serve_a_machine_with_empty_caches(first, tmp_path):
    """torch.compiler.save_cache_artifacts and load_cache_artifacts: one file that can be shipped with a model."""
    found, folder = first
    loaded = compiled_in_a_process(tmp_path, "load", str(folder / "artifacts"))
    assert hit(loaded) and loaded["difference_to_eager"] == found["difference_to_eager"]
