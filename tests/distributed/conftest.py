"""The parity matrix runs once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.parity.launches import Results, make_inputs


@pytest.fixture(scope="session")
def parity_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, their checkpoints and the data that all cases train on."""
    folder = tmp_path_factory.mktemp("parity")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def results(parity_folder: Path) -> Results:
    """Numbers of all cases."""
    return Results(parity_folder)
