"""The documentation names what exists: commands, modules, files, Python names. make docs builds the site."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

import mixdq_ao
from mixdq_ao.app.cli import COMMANDS, parser

from .notebook import is_clean

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in [*PAGES, ROOT / "README.md"]}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; "" for those that name none."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def found(dotted: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    module, _, name = dotted.rpartition(".")
    try:
        import_module(dotted)
    except ModuleNotFoundError:
        return hasattr(import_module(module), name)
    return True


@pytest.mark.parametrize("page", TEXTS)
def test_names_in_the_api_pages_exist(page):
    for name in re.findall(r"^::: (\S+)|\]\[((?:mixdq_ao|inductor_kernels)\.\S+?)\]", TEXTS[page], re.M):
        assert found(next(filter(None, name))), name


def test_every_public_name_is_in_an_api_page():
    shown = set(re.findall(r"^::: (\S+)", "\n".join(TEXTS.values()), re.M))
    homes = {name: f"mixdq_ao.{home}" for name, home in mixdq_ao._HOME.items()}
    assert [name for name, home in homes.items() if not {home, f"{home}.{name}"} & shown] == []


@pytest.mark.parametrize("page", TEXTS)
def test_python_parses_and_imports_what_exists(page):
    for block in blocks(TEXTS[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert all(hasattr(import_module(node.module), alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", TEXTS)
def test_commands_are_accepted(page, capsys):
    """Those spelled out in a block in full, those mentioned in a line by their name."""
    for name in re.findall(r"`mixdq ([a-z]+)", TEXTS[page]):
        assert name in COMMANDS
    for line in "\n".join(blocks(TEXTS[page], "")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if line.startswith("mixdq ") else []
        if words[:1] == ["mixdq"]:
            try:
                parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{line}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", TEXTS)
def test_modules_and_files_exist(page):
    text = TEXTS[page]
    for module in re.findall(r"python -m ((?:benchmarks|examples)\.\w+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for name in re.findall(r"`((?:benchmarks|examples|tests|mixdq_ao|inductor_kernels)/[\w./]+)`", text):
        if name != "benchmarks/results/gpu":  # made by benchmarks/gpu.sh
            assert (ROOT / name).exists(), name
    for name in re.findall(r"`mixdq bench (\w+)`", text):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name


def test_every_command_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", TEXTS["docs/cli.md"], re.M)) == set(COMMANDS)


def test_results_named_by_the_page_of_figures_exist():
    page = TEXTS["docs/figures.md"]
    names = re.findall(r"`(\w+\.(?:md|json))`", page.partition("A command with")[0])
    missing = [n for n in names if not (ROOT / "benchmarks" / "results" / n).is_file()]
    assert names and not missing


def test_every_benchmark_has_its_command_on_the_page_of_figures():
    page, folder = TEXTS["docs/figures.md"], ROOT / "benchmarks"
    run = [p for p in folder.glob("*.py") if p.stem.startswith("test_") or "__main__" in p.read_text(encoding="utf-8")]
    run += [p.parent for p in folder.glob("*/__main__.py") if p.parent.name != "gpu"]  # by benchmarks/gpu.sh
    assert len(run) > 20
    alone = [p for p in run if p.stem != "compiling" and not p.stem.endswith("_subject")]  # those other ones start
    missing = [p.stem for p in alone if not re.search(rf"(benchmarks\.|bench-|`|bench ){p.stem}\b", page)]
    assert not missing


def test_relative_links_lead_somewhere():
    pages = [ROOT / page for page in TEXTS] + list((ROOT / "examples").rglob("*.md")) + list(ROOT.glob("*.md"))
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page, link)


def test_notebooks_hold_no_output():
    notebooks = list((ROOT / "examples").glob("*.ipynb"))
    assert notebooks and all(map(is_clean, notebooks))


def test_the_readme_begins_with_what_it_is_and_code_of_twelve_lines():
    text = TEXTS["README.md"]
    first = text.split("\n\n")[1].replace("\n", " ")
    assert first.endswith(".") and ". " not in first
    code = [line for line in blocks(text, "python")[0].splitlines() if line.strip()]
    assert len(code) <= 12


def test_the_code_of_the_readme_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    """Compiling takes minutes, so here the UNet stays eager."""
    text = TEXTS["README.md"]
    code, said = blocks(text, "python")[0], text.partition("```python")[2].partition("```\n")[2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.strip()
    promised = blocks(said, "text")[0].strip()
    assert printed.partition(",")[0] == promised.partition(",")[0] == "4.00 weight bits"
    sizes = [float(re.findall(r"([\d.]+) MiB", line)[0]) for line in (printed, promised)]
    assert abs(sizes[0] - sizes[1]) < 0.05  # another CPU may round a score differently
    with Image.open(tmp_path / "circle.png") as picture:
        assert picture.size == (64, 64)
