"""Odd inputs through every command line: an error in our words or a result whose counts add up, never a library's traceback."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_longpo.cli import COMMANDS, function_of
from megatron_longpo.data.indexed import PreferenceData, path_of
from megatron_longpo.errors import LongPOError
from megatron_longpo.runtime.failure import explain
from megatron_longpo.text import preprocess as module
from megatron_longpo.text.chat import ChatTokenizer, load_tokenizer
from megatron_longpo.text.preprocess import Settings, preprocess
from tests.support.data import text_row, tokenised_row
from tests.support.tokenizers import make_fast_tokenizer

pytestmark = pytest.mark.slow

QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}

_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool", "human"]),
        "content": st.sampled_from(["a", "b c", "", None, "{{context}}"]),
    },
    optional={
        "tool_calls": st.sampled_from([None, [], [{"function": {"name": "f", "arguments": "{}"}}], "f"]),
        "name": _json,
    },
)
_messages = st.lists(_message, max_size=3) | st.sampled_from(["Where?", "There.", ""]) | _json


@st.composite
def _row(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from(["text", "text", "turn", "chat", "chat", "tokenised", "junk"]))
    row: Any
    if kind == "junk":
        return draw(_json)
    if kind == "chat":
        row = {"prompt": "Where?", "chosen": "There.", "rejected": "Here."}
        changed = st.dictionaries(
            st.sampled_from(
                ["prompt", "chosen", "rejected", "context", "short_context", "system", "tools", "weight", "x"]
            ),
            _messages,
            max_size=2,
        )
        return {**row, **draw(changed)}
    row = tokenised_row() if kind == "tokenised" else text_row(draw(st.integers(0, 3)), turns=draw(st.integers(0, 3)))
    if kind == "turn" and row["turns"]:
        row["turns"][0][draw(st.sampled_from(["instruction", "short_context", "chosen", "rejected", "y"]))] = draw(
            _json
        )
    elif draw(st.booleans()):
        row[draw(st.sampled_from([*sorted(row), "system", "weight", "z"]))] = draw(_json)
    return row


@st.composite
def _input(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name and content of an input file."""
    rows = draw(st.lists(_row(), max_size=6))
    shape = draw(st.sampled_from(["lines", "lines", "array", "indented", "junk between"]))
    if shape == "array":
        content = json.dumps(rows, indent=draw(st.sampled_from([None, 1]))).encode()
    elif shape == "indented":
        content = "\n".join(json.dumps(row, indent=2) for row in rows).encode()
    else:
        lines = [json.dumps(row).encode() for row in rows]
        if shape == "junk between":
            lines.insert(draw(st.integers(0, len(lines))), draw(st.binary(max_size=12)))
        content = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines)
    content = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"])) + content
    name = draw(st.sampled_from(["a.jsonl", "a.jsonl", "a.json", "a.jsonl.gz"]))
    return name, gzip.compress(content) if name.endswith(".gz") else content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fast_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["text", "tokenised"])
def test_counts_add_up(
    kind: str,
    folder: Path,
    tokenizer: ChatTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each row of the input is a sample or was skipped as a whole, once; each skipped turn is of a row with a sample, or too."""
    monkeypatch.setattr(module, "tokenizer_of", lambda settings: tokenizer if settings.tokenizer else None)

    @settings(max_examples=120 if kind == "text" else 40, **QUICK)  # type: ignore[arg-type]
    @given(file=_input(), keep=st.booleans())
    def check(file: tuple[str, bytes], keep: bool) -> None:
        place = tmp_path_factory.mktemp("odd")
        (place / file[0]).write_bytes(file[1])
        made = {"tokenizer": str(folder)} if kind == "text" else {"vocab_size": 64}
        chosen = Settings(**made, keep_duplicates=keep, ignore_keys=("z",))  # type: ignore[arg-type]
        try:
            manifest = preprocess([str(place / file[0])], place / "out", chosen)
        except LongPOError:
            return
        skipped = [json.loads(line) for line in path_of(place / "out", "rejects.jsonl").read_text().splitlines()]
        whole = {record["line"] for record in skipped if "turn" not in record}
        assert manifest.rows == manifest.samples + len(whole) == len(list(module.read_rows([place / file[0]], 0)))
        assert len(skipped) == sum(manifest.skip_reasons.values())
        data = PreferenceData(place / "out")
        assert len(data) == manifest.samples
        assert sum(data[number].turns for number in range(len(data))) == manifest.turns
        assert all(
            record["reason"] != "not_encodable" or "surrogate" in record["detail"].lower() for record in skipped
        ), skipped

    check()


# --------------------------------------------------------------------------------------------------
# All command lines
# --------------------------------------------------------------------------------------------------

LINES = {
    "preprocess": [
        ["--input", "FILE", "--tokenizer", "FOLDER", "--output-prefix", "OUT"],
        ["--input", "FOLDER", "--vocab-size", "64", "--output-prefix", "OUT", "--split", "WORD"],
        [
            "--input",
            "GOOD",
            "--tokenizer",
            "TOKENIZER",
            "--output-prefix",
            "OUT",
            "--chat-template",
            "FILE",
            "--show",
            "1",
        ],
        ["--input", "GOOD", "--tokenizer", "TOKENIZER", "--output-prefix", "OUT", "--chat-template-kwargs", "WORD"],
        ["--input", "GOOD", "--tokenizer", "TOKENIZER", "--output-prefix", "OUT", "--template-date", "WORD"],
    ],
    "preprocess inspect": [["PREFIX"], ["PREFIX", "--tokenizer", "FOLDER", "--samples", "3"]],
    "convert import": [
        ["--hf", "FOLDER", "--output", "OUT"],
        ["--hf", "FOLDER", "--output", "OUT", "--rotary-base", "WORD"],
    ],
    "convert verify": [["--checkpoint", "FOLDER", "--hf", "FOLDER"]],
    "convert export": [["--checkpoint", "FOLDER", "--output", "OUT"]],
    "generate": [
        ["--documents", "FILE", "--model", "FOLDER", "--output", "OUT"],
        ["--documents", "FOLDER", "--model", "WORD", "--output", "OUT"],
    ],
    "generate merge": [["--output", "FILE"]],
    "evaluate": [
        ["--model", "FOLDER", "--tasks", "needle", "--lengths", "4K", "--haystack", "FILE", "--output", "OUT"],
        ["--model", "WORD", "--tasks", "WORD", "--output", "OUT"],
    ],
    "evaluate compare": [["FOLDER", "FOLDER", "--output", "OUT"]],
    "evolve": [["--config", "FILE"], ["--config", "FILE", "--check"], ["--config", "FILE", "--redo", "WORD"]],
    "evolve status": [["--config", "FILE"]],
    "evolve report": [["--config", "FILE"]],
    "plan": [
        ["--hf", "FOLDER", "--gpus", "2", "--length", "2048", "--output", "OUT"],
        ["--hf", "FILE", "--gpus", "2", "--gpu", "FILE", "--length", "2048"],
        ["--config", "FILE", "--data-path", "PREFIX"],
    ],
    "replay": [["FOLDER", "3"]],
    "compare-runs": [["FOLDER", "FOLDER"]],
    "watch": [["FOLDER", "--once"]],
    "status": [["FOLDER"], ["FOLDER", "--alive", "60"]],
    "train": [["--data-path", "PREFIX", "--load", "FOLDER", "--save", "OUT"], ["--config", "FILE"]],
}
_NAMES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "model.json",
    "results.json",
    "state.json",
    "heartbeat.json",
    "metrics.jsonl",
)


@settings(max_examples=100, **QUICK)  # type: ignore[arg-type]
@given(data=st.data())
def test_every_command_line_answers_in_our_words(
    data: st.DataObject, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("odd")
    name = data.draw(st.sampled_from(sorted(LINES)))
    content = st.one_of(
        st.binary(max_size=20),
        _json.map(lambda value: json.dumps(value).encode()),
        st.sampled_from(
            [b"", b"{}", b"[]", b"{% for %}", b"{{ x.y.z }}", b"a: [", b"model: {beta: 1}", b"\xff\xfe{\x00}\x00"]
        ),
    )
    suffix = data.draw(st.sampled_from([".jsonl", ".json", ".parquet", ".arrow", ".txt", ".yaml", ""]))
    (place / f"file{suffix}").write_bytes(data.draw(content))
    (place / "folder").mkdir()
    for part in data.draw(st.lists(st.sampled_from(_NAMES), max_size=3, unique=True)):
        (place / "folder" / part).write_bytes(data.draw(content))
    for ending in (".json", ".bin", ".idx"):
        if data.draw(st.booleans()):
            (place / f"prefix{ending}").write_bytes(data.draw(content))
    (place / "good.jsonl").write_text(json.dumps(text_row()) + "\n")
    words = {
        "FILE": str(place / f"file{suffix}"),
        "FOLDER": str(place / "folder"),
        "PREFIX": str(place / "prefix"),
        "OUT": str(place / "out"),
        "GOOD": str(place / "good.jsonl"),
        "TOKENIZER": str(folder),
        "WORD": data.draw(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
        ),
    }
    line = [words.get(word, word) for word in data.draw(st.sampled_from(LINES[name]))]
    try:
        function_of(name)(line, prog="odd")
    except SystemExit as error:
        assert error.code in (0, 2)
    except Exception as error:
        assert isinstance(error, LongPOError) or explain(error) is not None, line
        assert "\n" not in str(error) or not isinstance(error, LongPOError)


def test_all_commands_are_tried() -> None:
    # The simulation builds its fake device first, and the other two start processes that measure for minutes: their own tests
    # try odd inputs.
    assert set(LINES) == set(COMMANDS) - {"simulate", "doctor", "plan calibrate"}
