"""Shell completion, asked in a real bash."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixdq_ao.app import cli
from tests.command import run

BASH = shutil.which("bash")
ASK = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); {name}; printf "%s\\n" "${{COMPREPLY[@]}}"'


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    pytest.importorskip("shtab", reason="completion is an extra")
    path = tmp_path_factory.mktemp("completion") / "mixdq.bash"
    with path.open("w") as file:
        subprocess.run([sys.executable, "-m", "mixdq_ao.app.cli", "completion", "bash"], stdout=file, check=True)
    return path


def ask(script: Path, *words: str, cwd: Path | None = None) -> set[str]:
    """What bash offers for the last word."""
    line = next(line for line in script.read_text().splitlines() if line.startswith("complete "))
    name = line.split("-F ")[1].split()[0]
    command = [str(BASH), "-c", ASK.format(name=name), "bash", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    return {line.strip() for line in done.stdout.splitlines() if line.strip()}


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_commands_options_choices_and_files(script, tmp_path):
    assert ask(script, "mixdq", "") >= set(cli.COMMANDS)
    assert ask(script, "mixdq", "cal") == {"calibrate"}
    assert {"--plan", "--calibration", "--json"} <= ask(script, "mixdq", "quantize", "--")
    assert ask(script, "mixdq", "calibrate", "--method", "p") == {"percentile"}
    assert "search" in ask(script, "mixdq", "schedule", "")
    (tmp_path / "plan_w4a8.json").write_text("{}")
    assert ask(script, "mixdq", "doctor", "--plan", "plan_", cwd=tmp_path) == {"plan_w4a8.json"}


def test_without_the_library(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, out, err = run(capsys, "completion", "zsh")
    assert (code, out) == (2, "") and "pip install 'mixdq-ao[completion]'" in err
