"""Docstrings say what is there: every name under Args is a parameter, every name under Attributes an attribute."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launch import ROOT

MODULES = sorted((ROOT / "megatron_longpo").rglob("*.py"))
Documented = ast.FunctionDef | ast.ClassDef
HEADINGS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:")


def documented_names(docstring: str, heading: str) -> list[str]:
    """Names that stand before a colon in a section; several may share a line: ``a, b: ...``."""
    names: list[str] = []
    inside = False
    for line in docstring.splitlines():
        if line.strip() in HEADINGS:
            inside = line.strip() == heading
        elif not line.strip():
            inside = False
        elif inside and (match := re.match(r"    ((?:\*{0,2}\w+(?:, )?)+):( |$)", line)):
            names += [name.lstrip("*") for name in match[1].split(", ")]
    return names


def parameters(function: ast.FunctionDef) -> set[str]:
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return {argument.arg for argument in every}


def members(cls: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Names of a class and its bases in the module: fields, properties, methods, and what ``__init__`` sets."""
    names = set()
    for node in ast.walk(cls):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            for target in [node.target] if isinstance(node, ast.AnnAssign) else node.targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        names.add(part.id)
                    elif isinstance(part, ast.Attribute):
                        names.add(part.attr)
    for base in cls.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            names |= members(classes[base.id], classes)
    return names


def wrong_names(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if not isinstance(node, Documented):
            continue
        docstring = ast.get_docstring(node) or ""
        if isinstance(node, ast.FunctionDef):
            known = parameters(node)
        else:
            constructors = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
            known = members(node, classes).union(*map(parameters, constructors))
        for heading in ("Args:", "Attributes:"):
            for name in documented_names(docstring, heading):
                if name not in known:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} documents {name}, which it does not have"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_documented_names_are_there(path: Path) -> None:
    assert not list(wrong_names(path))
