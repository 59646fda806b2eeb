"""A tiny chat model and a real server of it, once for all tests that ask one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.flaky_proxy import wait_until_up
from tests.support.launch import PYTHON, Running, environment, free_port
from tests.support.models import make_chat_model
from tests.support.tokenizers import make_fast_tokenizer


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the server serves; a model made in the same way has the same weights."""
    folder = tmp_path_factory.mktemp("served")
    make_fast_tokenizer(folder / "model")
    return make_chat_model(folder / "model")


@pytest.fixture(scope="session")
def server(chat_model: Path) -> Iterator[str]:
    """transformers' own server with the tiny model."""
    port = free_port()
    serve = ["-m", "transformers.cli.transformers", "serve", str(chat_model)]
    flags = ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = Running([PYTHON, *serve, *flags], env=environment(HF_HUB_OFFLINE="1"))
    try:
        wait_until_up(f"http://localhost:{port}/health", 120)
        yield f"http://localhost:{port}"
    finally:
        process.kill()
