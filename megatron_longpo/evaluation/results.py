"""results.json: settings, sample counts and metrics of every suite that an output folder holds."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_longpo.errors import ConfigError
from megatron_longpo.runtime.checked_json import read_checked, write_checked

FORMAT = 1
NAME = "results.json"


def read_results(output: Path) -> dict[str, Any]:
    """Content of results.json.

    Raises:
        ConfigError: it is missing, cannot be read, or does not have its checksum.
    """
    path = output / NAME
    try:
        content = read_checked(path)
        if content["format"] != FORMAT or not isinstance(content["suites"], dict):
            raise ValueError(f"format {content['format']}")
        for name, suite in content["suites"].items():
            if not all(isinstance(suite[key], dict) for key in ("settings", "asked", "metrics")):
                raise ValueError(f"suite {name} lacks its settings, samples or metrics")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; name a folder that evaluate.py wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not a result of this version ({error}); evaluate again") from None
    return content


def read_or_begin(output: Path) -> dict[str, Any]:
    """Content of results.json, or that of an evaluation without suites."""
    return read_results(output) if (output / NAME).exists() else {"format": FORMAT, "suites": {}}


def write_results(output: Path, content: dict[str, Any]) -> None:
    """Write results.json, with its checksum."""
    write_checked(output / NAME, content)


def with_result(
    content: dict[str, Any],
    suite: str,
    *,
    settings: dict[str, Any],
    asked: dict[str, int],
    metrics: dict[str, Any],
    samples_sha256: str | None,
) -> dict[str, Any]:
    """The content with a suite's result added or replaced; ``samples_sha256`` is the checksum of its samples.jsonl."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    result = {"settings": settings, "asked": asked, "metrics": metrics, "finished": stamp}
    if samples_sha256 is not None:
        result["samples_sha256"] = samples_sha256
    return {**content, "suites": {**content["suites"], suite: result}}


def without_suites(content: dict[str, Any], suites: Collection[str]) -> dict[str, Any]:
    """The content without some suites' results."""
    return {**content, "suites": {name: result for name, result in content["suites"].items() if name not in suites}}
