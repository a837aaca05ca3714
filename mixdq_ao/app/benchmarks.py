"""Runs the benchmarks of the repository with pytest, in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import MixDQError

NEEDED = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}
FOUND_NONE = 5  # pytest's exit code where no test was selected
FIGURES = ("min", "median", "mean", "stddev", "rounds")


def names_of(names: Sequence[str] = (), *, gpu: bool = False, quick: bool = False) -> list[str]:
    """The benchmarks that ``names`` select, as "file::test". Raises MixDQError if there are none."""
    done = subprocess.run(
        [*_command(names, gpu, quick), "--collect-only", "-q", "-o", "addopts="],
        cwd=_root(),
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if "::" in line]
    _check(done.returncode if found else FOUND_NONE, names, done.stdout + done.stderr)
    return found


def run_benchmarks(
    names: Sequence[str] = (),
    *,
    gpu: bool = False,
    quick: bool = False,
    rounds: int | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """{benchmark: seconds (min, median, mean, stddev), rounds, and its ``extra_info``}.

    names: substrings of file or test names, any of which selects a benchmark. rounds: the minimum for each benchmark.
    out: where to keep pytest-benchmark's JSON. quick: only benchmarks marked so, half a minute. quiet: pytest prints to
    standard error.

    Raises MixDQError without a checkout or without pytest and pytest-benchmark, if nothing matches, or if one fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        kept = (out or Path(folder) / "benchmarks.json").absolute()
        kept.parent.mkdir(parents=True, exist_ok=True)
        command = [*_command(names, gpu, quick), "-s", "--benchmark-only", f"--benchmark-json={kept}"]
        command += [] if rounds is None else [f"--benchmark-min-rounds={rounds}"]
        done = subprocess.run(command, cwd=_root(), stdout=sys.stderr if quiet else None, check=False)
        _check(done.returncode, names)
        return figures_of(json.loads(kept.read_text(encoding="utf-8")))


def figures_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{benchmark: figures} from pytest-benchmark's JSON."""
    return {
        case["fullname"]: {name: case["stats"][name] for name in FIGURES} | case.get("extra_info", {})
        for case in document["benchmarks"]
    }


def _command(names: Sequence[str], gpu: bool, quick: bool) -> list[str]:
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise MixDQError(f"benchmarks need {' and '.join(missing)}: pip install 'mixdq-ao[test]'")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider"]
    marks = [mark for mark, wanted in (("not gpu", not gpu), ("quick", quick)) if wanted]
    command += ["-m", " and ".join(marks)] if marks else []
    return [*command, "-k", " or ".join(names)] if names else command


def _root() -> Path:
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "__init__.py").is_file():
        raise MixDQError(
            "benchmarks lie in the repository, which an installed wheel does not carry; run this from a checkout"
        )
    return root


def _check(code: int, names: Sequence[str], said: str = "") -> None:
    if code == FOUND_NONE:
        raise MixDQError(f"no benchmark matches {' or '.join(names) or 'here'}; mixdq bench --list shows them")
    if code:
        last = said.strip().splitlines()[-1:] or ["see above"]
        raise MixDQError(f"the benchmarks ended with code {code}: {last[0]}")
