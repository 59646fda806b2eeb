"""MkDocs hooks: the API reference, a page per package, and the option tables, from the code itself.

A line ``<!-- options: megatron_longpo.config.Config -->`` in a page becomes tables of that configuration's options, one
table per section. The pages of the API reference exist only while the site is built.
"""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from options import option_tables

PACKAGE = "megatron_longpo"
MARKER = re.compile(r"^<!-- options: (?P<module>[\w.]+)\.(?P<name>\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the option tables."""

    def tables(match: re.Match[str]) -> str:
        with warnings.catch_warnings():
            # Of megatron-core, about its own modules.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module(match["module"])
        return option_tables(getattr(module, match["name"]))

    return MARKER.sub(tables, markdown)


# --------------------------------------------------------------------------------------------------
# API reference
# --------------------------------------------------------------------------------------------------


def packages(root: Path) -> dict[str, list[str]]:
    """Modules by package; those that are in no package come first."""
    found: dict[str, list[str]] = {PACKAGE: []}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part.startswith("_") for part in parts):
            continue
        found.setdefault(parts[1] if len(parts) > 2 else PACKAGE, []).append(".".join(parts))
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give the reference its place in the navigation."""
    root = Path(config.config_file_path).parent
    names = packages(root)
    config.nav.append({"API reference": [{name: f"reference/{name}.md"} for name in names]})  # type: ignore[union-attr]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Write a reference page per package."""
    for name, modules in packages(Path(config.config_file_path).parent).items():
        title = PACKAGE if name == PACKAGE else f"{PACKAGE}.{name}"
        body = "\n\n".join(f"::: {module}" for module in modules)
        files.append(File.generated(config, f"reference/{name}.md", content=f"# {title}\n\n{body}\n"))
    return files
