"""Order of imports: the platform prepares megatron-core for the CPU, so it must be imported first, wherever one begins."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.launch import ROOT

PACKAGE = ROOT / "megatron_longpo"


def imported(path: Path) -> list[str]:
    """Modules that a file imports, in its order."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def uses_megatron(path: Path) -> bool:
    return any(name.startswith("megatron.core") for name in imported(path))


@pytest.mark.parametrize(
    "path", [p for p in sorted(PACKAGE.rglob("*.py")) if uses_megatron(p)], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_the_platform_is_imported_before_megatron_core(path: Path) -> None:
    platform = "megatron_longpo.runtime.platform"
    of_platform = imported(PACKAGE / "runtime" / "platform.py")
    if path.stem == "platform" or any(name.startswith(f"megatron_longpo.runtime.{path.stem}.") for name in of_platform):
        return  # the platform itself, and what it calls when it has done its work
    if imported(path.parent / "__init__.py") == [platform]:
        return
    names = imported(path)
    assert platform in names, f"{path} imports megatron-core without the platform"
    assert names.index(platform) < next(i for i, name in enumerate(names) if name.startswith("megatron.core"))


def test_the_package_itself_imports_nothing() -> None:
    assert imported(PACKAGE / "__init__.py") == []
