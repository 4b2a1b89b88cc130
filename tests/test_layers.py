"""Arrows point one way: models → vocabulary ← inference, with workflows, report and the command line on top."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import probmed.inference
import probmed.models

ROOT = Path(__file__).parent.parent
TOPS = ("cli", "report", "workflows", "__main__")


def sources() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for folder, name in ((ROOT / "probmed", "probmed"), (ROOT / "models", "probmed.models"), (ROOT / "inference", "probmed.inference")):
        for path in folder.rglob("*.py"):
            inner = path.relative_to(folder)
            if folder.name == "probmed" and inner.parts[0] in ("models", "inference"):
                continue
            parts = [p for p in (*name.split("."), *inner.with_suffix("").parts) if p != "__init__"]
            found[".".join(parts)] = path
    return found


SOURCES = sources()


def layer(module: str) -> str:
    parts = module.split(".")
    second = parts[1] if len(parts) > 1 else ""
    if second in ("models", "inference"):
        return second
    return "top" if second in TOPS else "vocabulary"


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in SOURCES else str(node.module) for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("probmed", "models", "inference")}


ALLOWED = {
    "vocabulary": {"vocabulary"},
    "models": {"vocabulary", "models"},
    "inference": {"vocabulary", "inference"},
    "top": {"vocabulary", "models", "inference", "top"},
}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_arrows_point_one_way(module: str) -> None:
    for imported in imports(SOURCES[module]):
        assert imported.startswith("probmed"), f"{module} imports {imported}: the installed names are probmed.models and probmed.inference"
        assert layer(imported) in ALLOWED[layer(module)], f"{module} ({layer(module)}) imports {imported} ({layer(imported)})"


def test_no_cycles() -> None:
    graph = {module: {name for name in imports(path) if name in SOURCES and name != module} for module, path in SOURCES.items()}
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != 1, " → ".join((*trail, module))
        if module in state:
            return
        state[module] = 1
        for name in graph[module]:
            visit(name, (*trail, module))
        state[module] = 2

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_no_imports_inside_functions(module: str) -> None:
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [child for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom)]
            assert not inner, f"{module}.{node.name} imports inside itself"


def test_nothing_generic_is_imported() -> None:
    """The folders `models` and `inference` are imported under probmed alone, here and by every other test."""
    assert {module.__name__ for module in (probmed.models, probmed.inference)} == {"probmed.models", "probmed.inference"}
    assert not {"models", "inference"} & set(sys.modules)
