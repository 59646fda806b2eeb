"""README and docs: command lines are accepted, option tables are whole, links and paths lead somewhere.

The programs' own parsers read the command lines in this process; nothing is run. An ellipsis stands for whatever the
reader fills in.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import grimp
import pytest
import tyro

from megatron_longpo.commands.calibrate import CalibrateOptions
from megatron_longpo.commands.convert import ExportOptions, ImportOptions, VerifyOptions
from megatron_longpo.commands.doctor import DoctorOptions
from megatron_longpo.commands.evolve import EvolveOptions
from megatron_longpo.commands.plan import PlanOptions
from megatron_longpo.commands.preprocess import InspectOptions, PreprocessOptions
from megatron_longpo.commands.replay import ReplayOptions
from megatron_longpo.commands.runs import CompareOptions, WatchOptions
from megatron_longpo.commands.simulate import SimulateOptions
from megatron_longpo.commands.status import StatusOptions
from megatron_longpo.config import Config
from megatron_longpo.evaluation.settings import EvaluationConfig
from megatron_longpo.evolution.settings import EvolveConfig, GateRule, Resources
from megatron_longpo.generation.settings import GenerationConfig
from tests.support.commands import parsed

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What may stand before a program, and takes arguments of its own.
LAUNCHERS = re.compile(r"(?:^|\s)(?:python|torchrun|sbatch|megatron-longpo)\s")
PROGRAM = re.compile(
    r"(?:tools/(?P<tool>\w+)\.py|-m (?P<module>megatron_longpo\.\w+)|examples/slurm/(?P<batch>\w+)\.sbatch"
    r"|megatron-longpo (?P<command>[\w-]+))(?P<arguments>.*)"
)


def shell_commands(page: Path) -> list[str]:
    """Lines of the page's bash blocks: continued lines joined, comments and ellipses removed."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s#.*|\s\.\.\.(?=\s|$)", "", line) for line in lines]


def commands() -> list[tuple[str, str, list[str]]]:
    """Page, program and arguments of each command line."""
    found = []
    for page in PAGES:
        for line in shell_commands(page):
            match = PROGRAM.search(line)
            if match and LAUNCHERS.search(line):
                name = match["tool"] or match["module"] or match["batch"] or match["command"]
                found.append((page.name, name, shlex.split(match["arguments"].split(";")[0])))
    return found


COMMANDS = commands()


def accept(name: str, arguments: list[str]) -> None:
    # Files that are the reader's own are not there; those of the repository are read.
    if "--config" in arguments and not (ROOT / arguments[arguments.index("--config") + 1]).exists():
        place = arguments.index("--config")
        arguments = arguments[:place] + arguments[place + 2 :]
    arguments = [str(ROOT / a) if a.startswith("examples/") else a for a in arguments]
    parsed(name, arguments)


PROGRAMS = {
    "convert": "convert",
    "convert_checkpoint": "convert",
    "plan": "plan",
    "preprocess": "preprocess",
    "preprocess_preference_data": "preprocess",
    "generate": "generate",
    "generate_preference_data": "generate",
    "evaluate": "evaluate",
    "evolve": "evolve",
    "self_evolve": "evolve",
    "simulate": "simulate",
    "doctor": "doctor",
    "megatron_longpo.doctor": "doctor",
    "status": "status",
    "watch": "watch",
    "compare-runs": "compare-runs",
    "replay": "replay",
    "train": "train",
    "megatron_longpo.train": "train",
}


def test_the_pages_show_every_program() -> None:
    shown = {PROGRAMS[name] for _, name, _ in COMMANDS}
    assert shown == set(PROGRAMS.values())


@pytest.mark.parametrize(
    ("page", "program", "arguments"), COMMANDS, ids=[f"{page}: {program}" for page, program, _ in COMMANDS]
)
def test_a_command_line_in_the_docs_is_accepted(
    page: str, program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    try:
        accept(PROGRAMS[program], arguments)
    except SystemExit as ending:
        # --help ends so, too.
        assert not ending.code, f"{page}: {program} {' '.join(arguments)}"


def test_flags_of_benchmarks_in_the_docs_are_there() -> None:
    found = [
        (match[1], flag)
        for page in PAGES
        for match in re.finditer(r"benchmarks/(\w+\.py)((?: [^#`\n]+)?)", page.read_text(encoding="utf-8"))
        for flag in re.findall(r"--[\w-]+", match[2])
    ]
    assert len(found) > 20
    for name, flag in found:
        source = (ROOT / "benchmarks" / name).read_text(encoding="utf-8")
        assert f'"{flag}"' in source or f'"--no-{flag[2:]}"' in source, f"benchmarks/{name} has no {flag}"


# --------------------------------------------------------------------------------------------------
# Option tables
# --------------------------------------------------------------------------------------------------


def options_module() -> Any:
    spec = importlib.util.spec_from_file_location("options", ROOT / "docs" / "hooks" / "options.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Rule:
    rule: str


@dataclass(frozen=True)
class Base:
    size: Annotated[int, Rule("must be at least 1")] | None = None
    """Tokens | characters."""
    plain: bool = True


@dataclass(frozen=True)
class Section(Base):
    """A section for the test."""

    kind: Annotated[Literal["a", "b"], tyro.conf.arg(name="sort", help="Which of the two.")] = "a"
    names: tuple[str, ...] = ("x", "y")
    """Any number
    of names."""


@dataclass(frozen=True)
class Root:
    section: Section = field(default_factory=Section)


@dataclass(frozen=True)
class Flat:
    path: str
    """Where."""
    section: Section


SECTION_ROWS = [
    "| `size` | integer, at least 1 |  | Tokens \\| characters. |",
    "| `plain` | switch | on |  |",
    "| `sort` | `a` \\| `b` | `a` | Which of the two. |",
    "| `names` | list of text | `x, y` | Any number of names. |",
]
HEAD = ["| option | value | default | meaning |", "|---|---|---|---|"]


def test_an_option_table_comes_from_fields_annotations_and_the_strings_below_fields() -> None:
    tables = options_module().option_tables(Root).splitlines()
    assert tables == ["### `section`", "", "A section for the test.", "", *HEAD, *SECTION_ROWS]


def test_options_that_are_not_in_sections_are_one_table() -> None:
    tables = options_module().option_tables(Flat).splitlines()
    assert tables == [*HEAD, "| `path` | text | required | Where. |", *SECTION_ROWS]


OPTIONS = [
    *(Config, GenerationConfig, EvaluationConfig, PreprocessOptions, InspectOptions, SimulateOptions, PlanOptions),
    *(WatchOptions, CompareOptions, DoctorOptions),
    *(ImportOptions, ExportOptions, VerifyOptions),
    *(EvolveOptions, EvolveConfig, Resources, GateRule),
    *(StatusOptions, ReplayOptions, CalibrateOptions),
]


@pytest.mark.parametrize("root", OPTIONS, ids=lambda root: root.__name__)
def test_every_option_has_a_doc_and_a_place_in_the_tables(root: type) -> None:
    rows = options_module().option_rows(root)
    assert [row.name for row in rows if not row.doc] == []
    tables = options_module().option_tables(root)
    assert [row.name for row in rows if f"| `{row.name}` |" not in tables] == []
    assert f"<!-- options: {root.__module__}.{root.__name__} -->" in (ROOT / "docs" / "options.md").read_text("utf-8")


# --------------------------------------------------------------------------------------------------
# The picture of the packages
# --------------------------------------------------------------------------------------------------

# Modules that are one box of the picture.
BOXES = {
    **dict.fromkeys(("cli", "commands", "train"), "cli"),
    **dict.fromkeys(("command_line", "config", "schema", "errors"), "base"),
}


def test_arrows_between_packages_are_the_imports() -> None:
    graph = grimp.build_graph("megatron_longpo")
    imports: dict[str, set[str]] = {}
    for module in graph.modules - {"megatron_longpo"}:
        box = _box(module)
        imported = {_box(m) for m in graph.find_modules_directly_imported_by(module) if m != "megatron_longpo"}
        imports.setdefault(box, set()).update(imported - {box})
    # Arrows that follow from others are left out.
    needed = {
        (box, other)
        for box, others in imports.items()
        for other in others
        if not any(other in _below(third, imports) for third in others)
    }
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^    (\w+) --> (\w+)$", text, re.MULTILINE))
    assert drawn == needed | {("commands", "cli")}


def _box(module: str) -> str:
    name = module.split(".")[1]
    return BOXES.get(name, name)


def _below(box: str, imports: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(imports.get(box, ()))
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += imports.get(other, ())
    return found


# --------------------------------------------------------------------------------------------------
# Links and paths
# --------------------------------------------------------------------------------------------------


def test_links_between_the_files_of_the_repository_lead_somewhere() -> None:
    front = [
        ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")
    ]
    for page in [*front, *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path = target.split("#")[0]
            if path and not target.startswith(("http://", "https://")):
                assert (page.parent / path).exists(), f"{page.name}: {target}"


def test_paths_that_pages_name_are_there() -> None:
    # Pages about the package leave its own name out.
    rooms = [path.name for path in (ROOT / "megatron_longpo").iterdir() if path.is_dir() and path.name[0] != "_"]
    folders = {"": ("megatron_longpo", "tools", "benchmarks", "examples", "tests"), "megatron_longpo": rooms}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for parent, names in folders.items():
            for path in re.findall(rf"`((?:{'|'.join(names)})/[\w./]*)`", text):
                assert (ROOT / parent / path).exists(), f"{page.name}: {path}"
