"""The parity matrix, or what the selected tests need of it, runs once per session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.gpus import too_few
from tests.support.parity.cases import Case
from tests.support.parity.launches import Results, make_inputs


@pytest.fixture(scope="session")
def parity_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, their checkpoints and the data that all cases train on."""
    folder = tmp_path_factory.mktemp("parity")
    make_inputs(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases that have fewer GPUs than ranks are skipped, and pytest's summary names each: it folds skips of equal reasons."""
    for item in items:
        case = getattr(getattr(item, "callspec", None), "params", {}).get("case")
        reason = too_few(case.processes) if isinstance(case, Case) else None
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"{item.callspec.id}: {reason}"))  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def results(parity_folder: Path, request: pytest.FixtureRequest) -> Results:
    """Numbers of the cases that the session's tests compare: after ``-k one-dpo`` a few, else all."""
    names: set[str] = set()
    for item in request.session.items:
        if "results" in getattr(item, "fixturenames", ()):
            names |= _compared(getattr(item, "callspec", None))
    return Results(parity_folder, names)


def _compared(parameters: Any) -> set[str]:
    """Names of the cases that a test with these parameters compares."""
    values = parameters.params if parameters is not None else {}
    case: Case | None = values.get("case")
    if case is None:
        return {values[which] for which in ("name", "same") if which in values} or {"one"}
    return {case.name, case.oracle, *(["one-not-shared-bf16"] if case.bf16 else [])}
