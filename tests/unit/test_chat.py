"""Text into pieces: what is stored is what the template renders, for fast and SentencePiece tokenizers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_longpo.data.preference import Mode, long_rows, short_rows
from megatron_longpo.errors import DataError
from megatron_longpo.text.chat import BUILT_IN_TEMPLATES, ChatTokenizer, Turn, encode_sample, load_tokenizer, turn_of
from tests.support.tokenizers import (
    TEXT,
    make_fast_tokenizer,
    make_sentencepiece,
    package_folder,
    published_tokenizer,
)

TURNS = [
    Turn("When was the tower built?", TEXT[:70], "It was built in 1889.", "In the spring."),
    Turn("Where does it stand?", TEXT[20:120], "On the left bank.", "It stands there, by the river."),
]


@pytest.fixture(scope="module", params=["fast", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "fast":
        return load_tokenizer(make_fast_tokenizer(folder))
    return load_tokenizer(make_sentencepiece(folder), "mistral")


def _dialogue(answers: list[str]) -> list[dict[str, str]]:
    messages = []
    for number, (turn, answer) in enumerate(zip(TURNS, answers, strict=True)):
        content = f"{TEXT}\n\n{turn.instruction}" if number == 0 else turn.instruction
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def test_rows_are_the_rendered_dialogue(tokenizer: ChatTokenizer) -> None:
    sample = encode_sample(tokenizer, TEXT, TURNS)
    chosen, rejected = long_rows(sample, slot=0, turns="chained", nll_scope="sequence")
    for row, answers in ((chosen, [t.chosen for t in TURNS]), (rejected, [t.rejected for t in TURNS])):
        rendered = tokenizer.render(_dialogue(answers), add_generation_prompt=False)
        whole = tokenizer.encode(rendered, continues=False)
        # ChatML ends with a line feed after the end of the turn, which the model never says.
        assert tokenizer.decode(row.tokens_L.tolist()).strip() == tokenizer.decode(whole).strip()
        special = [t for t in row.tokens_L.tolist() if t in tokenizer.special_ids]
        assert special == [t for t in whole if t in tokenizer.special_ids]


ENDS = ("", " ", "\n", "\n\n", " \n", "\t\n ", "\n \n\n", ".\n", "!\n\n", " \u3000\n", "\r\n", "\u3002\n")


@pytest.fixture(scope="module", params=["bytes", "words", "smollm2", "llama", "mistral"])
def template_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of transformers and ours of the same folder: GPT-2's rules, those that join a full stop with line feeds, and a
    published one; then SentencePiece models, one of our own and Mistral's."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp(request.param)
    if request.param in ("llama", "mistral"):
        published = package_folder("mistral_common") / "data" / "tokenizer.model.v1"
        source = make_sentencepiece(folder / "made") if request.param == "llama" else published
        shutil.copy(source, folder / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": BUILT_IN_TEMPLATES["mistral"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    elif request.param == "smollm2":
        published_tokenizer("smollm2", folder)
    else:
        make_fast_tokenizer(folder)
    if request.param == "words":
        join_full_stops(folder / "tokenizer.json")
    return AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)


def join_full_stops(path: Path) -> None:
    """Split text as the tokenizers of GPT-4, Llama 3 and Qwen do, and have tokens that this splitting allows."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT + "".join(f"it is.{end}{end} \n\n\n\n" for end in ENDS) * 20], trainer)
    tokenizer.save(str(path))


STARTS = {"text": TEXT[:400].strip(), "word": "Tower", "no blanks": "\u5854" * 300}


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_document_that_ends_in_white_space(start: str, end: str, template_tokenizer: Any) -> None:
    """Rows have the token ids of the whole dialogue."""
    theirs, ours = template_tokenizer
    check_white_space(
        lambda messages: theirs.apply_chat_template(messages, tokenize=True, return_dict=False), ours, start, end
    )


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_a_document_that_ends_in_white_space_with_a_bare_sentencepiece_model(end: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_sentencepiece(tmp_path), "mistral")
    for start in STARTS.values():
        check_white_space(
            lambda messages: tokenizer.encode(tokenizer.render(messages, add_generation_prompt=False), continues=False),
            tokenizer,
            start,
            end,
        )


def check_white_space(encode: Callable[[Any], list[int]], ours: ChatTokenizer, start: str, end: str) -> None:
    """Rows of a document that ends in white space have the ids that ``encode`` gives the whole dialogue."""
    turns = [dataclasses.replace(turn, short_context=start[:3]) for turn in TURNS]
    context = start + end
    sample = encode_sample(ours, context, turns)
    (chained, *_), (first, second, *_) = (
        long_rows(sample, slot=0, turns=mode, nll_scope="sequence", sides=[Mode.CHOSEN])
        for mode in ("chained", "independent")
    )
    for row, asked in ((chained, turns), (first, turns[:1]), (second, turns[1:])):
        messages = []
        for turn in asked:
            content = turn.instruction if messages else f"{context}\n\n{turn.instruction}"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.chosen}]
        whole = encode(messages)
        # But for the line feed after the last end of turn.
        found = row.tokens_L.tolist()
        assert found == whole[: len(found)] and len(whole) - len(found) <= 1


def test_answers_end_with_the_end_of_turn(tokenizer: ChatTokenizer) -> None:
    sample = encode_sample(tokenizer, TEXT, TURNS)
    responses = [p for p in sample.pieces if p.mode & Mode.RESPONSE]
    assert len(responses) == 8
    for piece in responses:
        assert piece.tokens[-1] in tokenizer.special_ids
        assert not any(t in tokenizer.special_ids for t in piece.tokens[:-1].tolist())
    # The same answer has the same tokens after the chunk and after the document.
    long = [p.tokens.tolist() for p in responses if p.mode.long]
    short = [p.tokens.tolist() for p in responses if p.mode.short]
    assert long == short


def test_a_piece_that_continues_gets_no_space(tokenizer: ChatTokenizer) -> None:
    whole = tokenizer.encode("The river bank", continues=False)
    for cut in (3, 9):
        parts = tokenizer.encode("The river bank"[:cut], continues=False)
        parts += tokenizer.encode("The river bank"[cut:], continues=True)
        assert tokenizer.decode(parts) == tokenizer.decode(whole)


def test_independent_rows_render_as_single_turns(tokenizer: ChatTokenizer) -> None:
    sample = encode_sample(tokenizer, TEXT, TURNS)
    rows = long_rows(sample, slot=0, turns="independent", nll_scope="sequence")
    for turn, row in zip(TURNS, rows[:2], strict=True):
        messages = [
            {"role": "user", "content": f"{TEXT}\n\n{turn.instruction}"},
            {"role": "assistant", "content": turn.chosen},
        ]
        rendered = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=False), continues=False)
        assert tokenizer.decode(row.tokens_L.tolist()).strip() == tokenizer.decode(rendered).strip()


def test_short_rows_see_the_chunk_alone(tokenizer: ChatTokenizer) -> None:
    rows = short_rows(encode_sample(tokenizer, TEXT, TURNS), slot=0)
    assert len(rows) == 4
    text = tokenizer.decode(rows[2].tokens_L.tolist())
    assert TURNS[1].short_context.strip() in text and TURNS[1].chosen in text and TURNS[0].instruction not in text


def test_mistral_format_is_that_of_the_reference(tmp_path: Path) -> None:
    """mistral-common's v1 encoding, from its description: each part of a message tokenised by itself."""
    path = make_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(path, "mistral")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    expected = [sp.bos_id(), *sp.encode("[INST] Where? [/INST]"), *sp.encode("There."), sp.eos_id()]
    expected += [*sp.encode("[INST] When? [/INST]"), *sp.encode("Then."), sp.eos_id()]
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "Then."},
    ]
    assert tokenizer.encode(tokenizer.render(messages, add_generation_prompt=False), continues=False) == expected


def test_wrong_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(DataError, match="--chat-template"):
        load_tokenizer(make_fast_tokenizer(tmp_path / "bare", None))
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model", "mistral")
    with pytest.raises(DataError, match="no such file; name a file, or one of"):
        load_tokenizer(tmp_path / "bare", "alpaca")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NoSuch"}))
    with pytest.raises(DataError, match="cannot load"):
        load_tokenizer(tmp_path / "empty", "chatml")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": "  "}, "empty_turn"),
        ({"rejected": None}, "wrong_type"),
        ({"short_context": "never said"}, "chunk_not_in_context"),
    ],
)
def test_bad_turns_have_a_reason(change: dict[str, object], reason: str) -> None:
    from megatron_longpo.data.preference import BadRow

    turn = {"instruction": "i", "short_context": "tower", "chosen": "c", "rejected": "r", **change}
    with pytest.raises(BadRow) as caught:
        turn_of(turn, TEXT)
    assert caught.value.reason == reason


def test_a_prompt_may_have_the_beginning_of_its_answer(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "user", "content": "What is the tower?"}]
    with_prefix = tokenizer.prompt(messages, " The tower")
    rendered = tokenizer.render(messages, add_generation_prompt=True)
    assert with_prefix == tokenizer.encode(rendered + " The tower", continues=False)
    assert len(with_prefix) > len(tokenizer.prompt(messages))


def test_base_models_get_the_bare_text(tmp_path: Path) -> None:
    fast = load_tokenizer(make_fast_tokenizer(tmp_path, None), "plain")
    messages = [{"role": "user", "content": "The tower stands"}]
    text = fast.render(messages, add_generation_prompt=True)
    assert text.endswith("The tower stands") and "None" not in text and fast.answer_ends() == frozenset()
