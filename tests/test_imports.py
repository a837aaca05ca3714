"""Imports: no cycles, no Inductor in eager mode, and private names of torch in a few files only."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> set[str]:
    """The modules that a file imports when it is imported itself."""
    package, found = [*path.relative_to(ROOT).parent.parts], set()
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")] if node.level else []
            name = ".".join(filter(None, base)) or str(node.module)
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return found


def _running(node: ast.AST):
    """All nodes except those in functions and under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not checking and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _running(child)


def modules_of(package: str) -> dict[str, Path]:
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / package).rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


@pytest.mark.parametrize("package", ["mixdq_ao", "inductor_kernels"])
def test_no_module_needs_itself(package):
    modules = modules_of(package)
    graph = {name: imported(path) & modules.keys() - {name} for name, path in modules.items()}
    # a package is initialized before its modules, so they may import from a package that is still being imported
    graph = {name: {n for n in needs if not name.startswith(f"{n}.")} for name, needs in graph.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules) > 20  # CycleError names a cycle


def test_operators_load_without_inductor():
    modules, loaded, waiting = modules_of("inductor_kernels"), set(), ["inductor_kernels"]
    while waiting:
        name = waiting.pop()
        if name not in loaded:
            loaded.add(name)
            waiting += imported(modules[name]) if name in modules else ()
    assert "inductor_kernels.ops" in loaded and "inductor_kernels.compat_eager" in loaded
    assert not [name for name in loaded if name.startswith("torch._inductor") or name == "inductor_kernels.compat"]


PRIVATE = re.compile(r"torch(\.\w+)*\._[a-zA-Z]\w*")
HOMES = {"compat.py", "compat_eager.py", "pretend.py", "interpreted.py"}
"""The files that may use private names. The last two replace internals of torch and Triton, for tests without a GPU."""


def private(tree: ast.AST) -> set[str]:
    """The private names of torch that a file imports, or uses as attributes written out from ``torch`` on."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {name for name in found if PRIVATE.match(name)}


def test_private_names_are_found():
    tree = ast.parse("from torch.utils import _pytree\nimport torch\nx = torch._foreach_norm(y)\nz = torch.nn.Linear")
    assert private(tree) == {"torch.utils._pytree", "torch._foreach_norm"}


@pytest.mark.parametrize("package", ["mixdq_ao", "inductor_kernels"])
def test_what_torch_does_not_document_is_in_one_place(package):
    files = [path for path in (ROOT / package).rglob("*.py") if path.name not in HOMES]
    found = {str(path.relative_to(ROOT)): private(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    assert not {path: names for path, names in found.items() if names}
