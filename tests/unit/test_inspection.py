"""Windows into data: every token with its role, counts, and what sharing saves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_longpo.commands.preprocess import inspect, preprocess
from megatron_longpo.data.indexed import PreferenceData
from megatron_longpo.data.preference import Mode, Piece, Sample
from megatron_longpo.errors import LongPOError
from megatron_longpo.text.chat import load_tokenizer
from megatron_longpo.text.inspection import sharing_of, shown_sample, tables_of
from tests.support.data import text_row, write_data, write_lines
from tests.support.tokenizers import make_fast_tokenizer, make_sentencepiece
from tests.unit.test_template_families import OWN

BOTH, SHORT_BOTH = Mode.CHOSEN | Mode.REJECTED, Mode.SHORT_CHOSEN | Mode.SHORT_REJECTED


def piece(mode: Mode, *ids: int) -> Piece:
    return Piece(np.array(ids, np.int64), mode)


# A document of 3 tokens, a prompt of 2; chosen: thinking of 1 without a loss and 2 with one; rejected: 1; and a short chosen row.
SAMPLE = Sample(
    (
        piece(BOTH, 5, 6, 7),
        piece(BOTH | Mode.TURN, 8, 9),
        piece(Mode.CHOSEN, 10),
        piece(Mode.CHOSEN | Mode.RESPONSE, 11, 12),
        piece(Mode.REJECTED | Mode.RESPONSE, 13),
        piece(SHORT_BOTH, 6, 8),
        piece(Mode.SHORT_CHOSEN | Mode.RESPONSE, 11),
        piece(Mode.SHORT_REJECTED | Mode.RESPONSE, 13),
    )
)


def test_every_token_has_its_role() -> None:
    shown = shown_sample(SAMPLE, "one", None)
    rows = {row.title: [(run.role, [token.number for token in run.tokens]) for run in row.runs] for row in shown.rows}
    start = [("document", [5, 6, 7]), ("prompt", [8, 9])]
    assert rows == {
        "long chosen": [*start, ("silent", [10]), ("chosen", [11, 12])],
        "long rejected": [*start, ("rejected", [13])],
        "short chosen": [("prompt", [6, 8]), ("chosen", [11])],
        "short rejected": [("prompt", [6, 8]), ("rejected", [13])],
    }
    assert [row.count for row in shown.rows] == [8, 6, 3, 3]


def test_sharing_is_counted_by_hand(tmp_path: Path) -> None:
    data = PreferenceData(write_data(tmp_path / "data", [SAMPLE, SAMPLE]))
    sharing = sharing_of(data)
    # Long rows of 8 and 6 tokens, of which 5 are the same.
    assert (sharing.alone, sharing.shared) == (28, 10) and sharing.saved == 10 / 28
    figures = {name: figure for table in tables_of(data) for name, figure, _ in table.rows}
    assert (
        figures["samples"] == "2"
        and figures["saved"] == "10 (35.7%)"
        and figures["rows of the input"] == "not recorded"
    )


@pytest.mark.parametrize("kind", ["fast", "sentencepiece"])
def test_texts_of_tokens_are_the_text(tmp_path: Path, kind: str) -> None:
    """Blanks between words, characters of several tokens, and special tokens."""
    made = make_fast_tokenizer(tmp_path) if kind == "fast" else make_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(made, "plain")
    special = next(iter(tokenizer.special_tokens)) if kind == "fast" else "<s>"
    text = f"{special}The river — on a clear day 塔 stands.{special}Yes"
    ids = tokenizer.encode(text, continues=False)
    (row, _) = shown_sample(
        Sample((piece(BOTH | Mode.TURN, *ids), piece(BOTH | Mode.RESPONSE, *ids))), "one", tokenizer
    ).rows
    assert "".join(token.text for token in row.runs[0].tokens) == text
    assert [token.number for token in row.runs[0].tokens] == ids


def test_long_runs_are_shortened_in_the_middle() -> None:
    long = Sample((piece(BOTH | Mode.TURN, *range(1000)), piece(BOTH | Mode.RESPONSE, 1)))
    run = shown_sample(long, "one", None).rows[0].runs[0]
    assert run.count == 1000 and len(run.tokens) == 401 and run.tokens[200].text == " … 600 tokens … "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fast_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_show_writes_a_page_and_nothing_else(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = text_row(0)
    evil["turns"][0]["chosen"] = "<script>alert(1)</script>"
    path = write_lines(tmp_path / "a.jsonl", [json.dumps(evil), "{", json.dumps(text_row(1)), json.dumps(text_row(2))])
    (tmp_path / "t.jinja").write_text(OWN["drops thinking of earlier turns"])
    flags = ["--input", str(path), "--tokenizer", str(folder), "--chat-template", str(tmp_path / "t.jinja")]
    preprocess([*flags, "--output-prefix", str(tmp_path / "made/out"), "--show", "2"], prog="p")
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["out.samples.html"]
    printed = capsys.readouterr().out
    assert "row 2 is skipped: not_json" in printed and "row 3" in printed and "Yes 2." not in printed
    page = (tmp_path / "made/out.samples.html").read_text()
    assert "<script>" not in page and "&lt;" in page and 'class="silent"' in page and "http" not in page


def test_inspect_shows_figures_and_samples(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", [json.dumps(text_row(i)) for i in range(3)])
    prefix = str(tmp_path / "out")
    preprocess(["--input", str(path), "--tokenizer", str(folder), "--output-prefix", prefix], prog="p")
    capsys.readouterr()
    html = tmp_path / "page.html"
    inspect([prefix, "--tokenizer", str(folder), "--samples", "2", "--html", str(html)], prog="p")
    printed = capsys.readouterr().out
    assert "rows of the input" in printed and "saved" in printed and "Yes 2." in printed and "Yes 1." not in printed
    assert "Sharing (tokens)" in html.read_text() and html.read_text().count("<details") == 1
    inspect([prefix], prog="p")
    other = make_sentencepiece(tmp_path / "other")
    for wrong, message in ((["--samples", "3"], "has 3 samples"), (["--tokenizer", str(other)], "another vocabulary")):
        with pytest.raises(LongPOError, match=message):
            inspect([prefix, *wrong], prog="p")
    with pytest.raises(LongPOError, match="there is no such file"):
        inspect([str(tmp_path / "nothing")], prog="p")
