"""Pairs of one and three turns with the chat templates of all known families: rows are the rendered dialogue, and answers
with their end of turn, and nothing else, have a loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.data.preference import Mode, Piece, Sample, long_rows, short_rows
from megatron_longpo.data.sequence import NO_RESPONSE
from megatron_longpo.text.chat import (
    BUILT_IN_TEMPLATES,
    ChatTokenizer,
    EarlierAnswers,
    Turn,
    encode_sample,
    load_tokenizer,
)
from tests.support.tokenizers import TEXT, make_fast_tokenizer, package_folder

CHATML = BUILT_IN_TEMPLATES["chatml"]
THINK = "'<think>\n\n</think>\n\n'"
OWN = {
    # GLM-4: no end of turn but the next speaker's token.
    "glm-4": (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "drops thinking of earlier turns": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ "
        + THINK
        + " }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "opens thinking in the prompt": CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"),
    "one more token after the last turn": CHATML.replace("{% endif %}", "{% else %}{{ '<|endoftext|>' }}{% endif %}"),
    "marks answers": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ '\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Relatives: an empty block that stays in earlier turns, one that only the prompt has, and marks in two parts.
    "keeps empty thinking": CHATML.replace(
        "message['content']", "('<think>\n\n</think>\n\n' if message.role == 'assistant' else '') + message['content']"
    ),
    "closed thinking in the prompt only": CHATML.replace(
        "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n\n</think>\n\n'"
    ),
    "marks answers in two parts": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}{{ '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
# Published templates of known families and of models that were distilled into them, as TRL carries them.
PUBLISHED = (
    *("llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507", "deepseek_r1_distill"),
    *("llama3_training", "qwen2_5_training", "qwen3_training", "deepseek_r1_distill_training"),
)
BUILT_IN = ("mistral", "mistral-v3", "llama-2", "chatml", "text")
KINDS = (*PUBLISHED, *BUILT_IN, *OWN)
# Templates whose prompt has a block that the finished dialogue lacks: the row follows the prompt.
OPENED = (
    "deepseek_r1_distill",
    "deepseek_r1_distill_training",
    "opens thinking in the prompt",
    "closed thinking in the prompt only",
)

TURNS = [
    Turn("When was the tower built?", TEXT[:70], "It was built in 1889.", "In the spring."),
    Turn("Where does it stand?", TEXT[20:120], "On the left bank.", "It stands there, by the river."),
    Turn("Who comes?", TEXT[30:130], "Many.", "People, to see it."),
]
SPECIAL = re.compile(r"<[|｜][^<>'\"\n]{1,40}[|｜]>|\[gMASK\]|<sop>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the special tokens of all templates."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(make_fast_tokenizer(path))
    found = {text for kind in KINDS for text in SPECIAL.findall(source_of(kind))}
    tokenizer.add_special_tokens(
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "additional_special_tokens": sorted({*found, "<|user|>", "<|assistant|>", "<|system|>"}),
        }
    )
    tokenizer.save_pretrained(path)
    return path


def source_of(kind: str) -> str:
    if kind in PUBLISHED:
        return (package_folder("trl") / "chat_templates" / f"{kind}.jinja").read_text(encoding="utf-8")
    return BUILT_IN_TEMPLATES.get(kind) or OWN[kind]


def tokenizer_of(folder: Path, kind: str, tmp_path: Path, **arguments: Any) -> ChatTokenizer:
    path = tmp_path / "template.jinja"
    path.write_text(source_of(kind), encoding="utf-8")
    return load_tokenizer(folder, str(path), **arguments)


def text_of(tokenizer: ChatTokenizer, ids: Any) -> str:
    return str(tokenizer._tokenizer.decode([int(i) for i in ids]))  # type: ignore[attr-defined]


def dialogue(turns: list[Turn], side: str) -> list[dict[str, str]]:
    messages = []
    for number, turn in enumerate(turns):
        content = turn.instruction if number else f"{TEXT}\n\n{turn.instruction}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": getattr(turn, side)}]
    return messages


def losses(tokenizer: ChatTokenizer, row: Any) -> list[str]:
    """Texts of the runs of tokens with a loss."""
    runs: list[list[int]] = []
    before = False
    for token, response in zip(row.tokens_L.tolist(), row.response_L.tolist(), strict=True):
        if response != NO_RESPONSE:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = response != NO_RESPONSE
    return [text_of(tokenizer, run) for run in runs]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_dialogue_and_only_answers_have_a_loss(
    folder: Path, tmp_path: Path, kind: str, count: int
) -> None:
    tokenizer, turns = tokenizer_of(folder, kind, tmp_path), TURNS[:count]
    assert tokenizer.turn_end is not None
    end = tokenizer.turn_end.text
    sample = encode_sample(tokenizer, TEXT, turns)
    sample.check()
    for row, side in zip(
        long_rows(sample, slot=0, turns="chained", nll_scope="sequence"), ("chosen", "rejected"), strict=True
    ):
        messages, answers = dialogue(turns, side), [getattr(turn, side) for turn in turns]
        theirs = tokenizer._tokenizer.apply_chat_template  # type: ignore[attr-defined]
        expected = theirs(messages, tokenize=False)
        if kind in OPENED:
            expected = theirs(messages[:-1], tokenize=False, add_generation_prompt=True) + answers[-1] + end
        # What follows the last end of turn is not trained; GLM-4's last answer gets one.
        if not tokenizer.turn_end.is_rendered:
            expected += end
        expected = expected[: expected.rindex(end) + len(end)]
        assert text_of(tokenizer, row.tokens_L) == text_of(tokenizer, tokenizer.encode(expected, continues=False))
        assert [text.strip() for text in losses(tokenizer, row)] == [
            (answer + (" " if kind == "llama-2" else "") + end) for answer in answers
        ]
    shorts = short_rows(sample, slot=0)
    assert [text.strip() for row in shorts for text in losses(tokenizer, row)] == [
        answer + (" " if kind == "llama-2" else "") + end for turn in turns for answer in (turn.chosen, turn.rejected)
    ]
    independent = long_rows(sample, slot=0, turns="independent", nll_scope="sequence")
    for number, turn in enumerate(turns):
        alone = encode_sample(tokenizer, TEXT, [turn])
        for row, other in zip(
            (independent[number], independent[count + number]),
            long_rows(alone, slot=0, turns="chained", nll_scope="sequence"),
            strict=True,
        ):
            assert row.tokens_L.tolist() == other.tokens_L.tolist()
            assert row.response_L.tolist() == other.response_L.tolist()


THOUGHTS = [
    Turn(
        t.instruction,
        t.short_context,
        f"<think>\nHm {i}.\n</think>\n\n{t.chosen}",
        f"<think>\nNo {i}.\n</think>\n\n{t.rejected}",
    )
    for i, t in enumerate(TURNS)
]


@pytest.mark.parametrize("layout", ["finished", "as_answered"])
def test_thinking_of_earlier_turns(folder: Path, tmp_path: Path, layout: EarlierAnswers) -> None:
    """Qwen3 drops it once the dialogue goes on; as_answered keeps it. A thought has a loss, like the answer."""
    tokenizer = tokenizer_of(folder, "qwen3", tmp_path)
    sample = encode_sample(tokenizer, TEXT, THOUGHTS, earlier_answers=layout)
    row = long_rows(sample, slot=0, turns="chained", nll_scope="sequence")[0]
    whole = [f"{turn.chosen}<|im_end|>" for turn in THOUGHTS]
    dropped = [*(f"{turn.chosen}<|im_end|>" for turn in TURNS[:2]), whole[2]]
    expected = dropped if layout == "finished" else whole
    assert losses(tokenizer, row) == expected
    shorts = short_rows(sample, slot=0)
    assert [losses(tokenizer, row) for row in shorts[::2]] == [[text] for text in expected]
    if layout == "finished":
        theirs = tokenizer._tokenizer.apply_chat_template(dialogue(THOUGHTS, "chosen"), tokenize=False)  # type: ignore[attr-defined]
        assert text_of(tokenizer, row.tokens_L) + "\n" == theirs


def test_a_given_argument_of_the_template_is_prompt(folder: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(folder, "qwen3", tmp_path, template_kwargs={"enable_thinking": False})
    sample = encode_sample(tokenizer, TEXT, TURNS)
    for row in short_rows(sample, slot=0):
        text = text_of(tokenizer, row.tokens_L)
        assert text.count("<think>\n\n</think>\n\n") == 1 and "think" not in losses(tokenizer, row)[0]


@pytest.mark.parametrize("answer", ["<think>\nHm.\n</think>\n\nYes.", "Hm.\n</think>\n\nYes."])
def test_thinking_that_the_prompt_opens_is_not_opened_twice(folder: Path, tmp_path: Path, answer: str) -> None:
    """R1's prompt ends with <think>: the model's own text goes on behind it, and complete blocks of other data do too."""
    tokenizer = tokenizer_of(folder, "deepseek_r1_distill", tmp_path)
    sample = encode_sample(tokenizer, TEXT, [Turn("Why?", TEXT[:70], answer, "No.")])
    row = long_rows(sample, slot=0, turns="chained", nll_scope="sequence")[0]
    end = "<｜end▁of▁sentence｜>"
    assert losses(tokenizer, row) == [f"Hm.\n</think>\n\nYes.{end}"]
    assert text_of(tokenizer, row.tokens_L).endswith(f"<｜Assistant｜><think>\nHm.\n</think>\n\nYes.{end}")


@pytest.mark.parametrize("kind", ["qwen3", "llama3", "glm-4", "chatml"])
def test_a_system_message_begins_long_and_short_rows(folder: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = tokenizer_of(folder, kind, tmp_path)
    sample = encode_sample(tokenizer, TEXT, TURNS, system="You are a pirate.")
    rows = [*long_rows(sample, slot=0, turns="independent", nll_scope="sequence"), *short_rows(sample, slot=0)]
    assert all(text_of(tokenizer, row.tokens_L).count("You are a pirate.") == 1 for row in rows)
    assert not any("pirate" in text for row in rows for text in losses(tokenizer, row))


@pytest.mark.parametrize(("kind", "has"), [("mistral", False), ("llama-2", False), ("chatml", True), ("glm-4", True)])
def test_templates_without_system_messages_are_known(folder: Path, tmp_path: Path, kind: str, has: bool) -> None:
    assert tokenizer_of(folder, kind, tmp_path).renders_system is has


def test_results_of_tools_stay_between_answers_of_independent_rows() -> None:
    """Tokens without a loss inside an answer keep their place."""
    import numpy as np

    def piece(mode: Mode, *ids: int) -> Piece:
        return Piece(np.array(ids), mode)

    long, chosen, rejected = Mode.CHOSEN | Mode.REJECTED, Mode.CHOSEN, Mode.REJECTED
    sample = Sample(
        (
            piece(long, 1),
            piece(long | Mode.TURN, 2),
            piece(chosen | Mode.RESPONSE, 3),
            piece(chosen, 4),
            piece(chosen | Mode.RESPONSE, 5),
            piece(rejected | Mode.RESPONSE, 6),
        )
    )
    rows = long_rows(sample, slot=0, turns="independent", nll_scope="sequence")
    assert [row.tokens_L.tolist() for row in rows] == [[1, 2, 3, 4, 5], [1, 2, 6]]
