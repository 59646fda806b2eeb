"""What import-linter cannot say of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.launch import ROOT

PLATFORM = ROOT / "megatron_longpo" / "runtime" / "platform.py"
FILES = [p for folder in ("megatron_longpo", "tools", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]


# In the process that simulates, these replace torch.cuda's functions; nothing else does.
SIMULATED = [ROOT / "megatron_longpo" / "simulation" / name for name in ("device.py", "step.py")]


@pytest.mark.parametrize(
    "path", [p for p in FILES if p not in (PLATFORM, *SIMULATED)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_only_the_platform_touches_torch_cuda(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.cuda", f"line {node.lineno}"
        elif isinstance(node, ast.Import):
            assert not any(a.name.startswith("torch.cuda") for a in node.names), f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{a.name}" for a in node.names}
            assert not any(n.startswith("torch.cuda") for n in names), f"line {node.lineno}"
