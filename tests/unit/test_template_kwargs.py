"""Arguments of chat templates: read from JSON, checked against the template, and passed to every rendering."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.text.chat import load_tokenizer
from megatron_longpo.text.template_kwargs import check_template_reads, parse_template_kwargs
from tests.support.tokenizers import make_fast_tokenizer, make_sentencepiece

# As Qwen3's: a prompt without thinking holds an empty thinking block.
SWITCHED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def test_arguments_are_a_json_object() -> None:
    assert parse_template_kwargs(None) == {}
    assert parse_template_kwargs("{}") == {}
    assert parse_template_kwargs('{"b": [1, {"c": null}], "a": false}') == {"a": False, "b": [1, {"c": None}]}
    assert list(parse_template_kwargs('{"b": 1, "a": 2}')) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("enable_thinking=false", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"messages": []}', "is passed by the program itself"),
        ('{"enable thinking": false}', "is no name of an argument"),
        ("[" * 100 + "]" * 100, "nested more than"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_template_kwargs(text)


def test_an_argument_that_the_template_does_not_mention_is_refused(tmp_path: Path) -> None:
    check_template_reads(SWITCHED, {"enable_thinking": False})
    check_template_reads("{% generation %}{{ thinking }}{% endgeneration %}", {"thinking": 1})
    with pytest.raises(DataError, match="'enable_think', which the chat template does not mention"):
        check_template_reads(SWITCHED, {"enable_think": False})
    with pytest.raises(DataError, match="'enable_thinking', which the chat template does not mention"):
        load_tokenizer(make_fast_tokenizer(tmp_path), template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize("kind", ["fast", "sentencepiece"])
def test_arguments_reach_the_template(kind: str, tmp_path: Path) -> None:
    path = make_fast_tokenizer(tmp_path / "t") if kind == "fast" else make_sentencepiece(tmp_path / "t")
    (tmp_path / "template").write_text(SWITCHED)
    question = [{"role": "user", "content": "Where?"}]
    plain, off = (
        load_tokenizer(path, str(tmp_path / "template"), template_kwargs=kwargs).render(
            question, add_generation_prompt=True
        )
        for kwargs in (None, {"enable_thinking": False})
    )
    assert off == plain + "<think>\n\n</think>\n\n" and plain.endswith("assistant\n")
