"""Thinking is parted from answers and has tokens of its own; replies that are no answers say why."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.engines.base import Engine, Prompt, Reply, Sampling
from megatron_longpo.engines.settings import EngineConfig, check_engine
from megatron_longpo.engines.thinking import NO_THINKING, Thinking
from megatron_longpo.engines.transformers_engine import TransformersEngine
from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation.suites.base import count_prompt
from megatron_longpo.generation.pairs import answer_short, ask
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.text.chat import BUILT_IN_TEMPLATES, ChatTokenizer, load_tokenizer
from tests.support.models import make_chat_model
from tests.support.tokenizers import make_fast_tokenizer

# As R1-Distill's: the prompt opens a thinking block.
OPENS = BUILT_IN_TEMPLATES["chatml"].removesuffix("{% endif %}") + "{{ '<think>\n' }}{% endif %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_fast_tokenizer(folder)
    return make_chat_model(folder)


@pytest.mark.parametrize(
    ("text", "opened", "thinking", "answer"),
    [
        (" Paris. ", False, "", "Paris."),
        ("<think>\nHm.\n</think>\n\nParis.", False, "<think>\nHm.\n</think>", "Paris."),
        ("<think>\n\n</think>\n\nParis.", False, "<think>\n\n</think>", "Paris."),
        # The template wrote the opening mark: known from the prompt, or not known.
        ("Hm.\n</think>\nParis.", True, "Hm.\n</think>", "Paris."),
        ("Hm.\n</think>\nParis.", False, "Hm.\n</think>", "Paris."),
        # Cut while it thought, or nothing after it.
        ("<think>\nHm. It is", False, "<think>\nHm. It is", ""),
        ("Hm. It is", True, "Hm. It is", ""),
        ("<think>Hm.</think>", False, "<think>Hm.</think>", ""),
        # Twice; and marks within an answer.
        ("<think>a</think> <think>b</think> c", False, "<think>a</think><think>b</think>", "c"),
        ("<think>a</think> Write <think> and </think>.", False, "<think>a</think>", "Write <think> and </think>."),
        ("Write <think> first.", False, "", "Write <think> first."),
        ("", False, "", ""),
    ],
)
def test_thinking_is_parted_by_hand(text: str, opened: bool, thinking: str, answer: str) -> None:
    assert NO_THINKING.part(text, opened=opened) == (thinking, answer)


@given(st.lists(st.sampled_from(["<t>", "</t>", "a", " "]), max_size=12), st.booleans())
def test_nothing_but_white_space_is_lost(parts: list[str], opened: bool) -> None:
    marks = Thinking(0, "<t>", "</t>")
    text = "".join(parts)
    thinking, answer = marks.part(text, opened=opened)
    assert "".join((thinking + answer).split()) == "".join(text.split())
    assert not answer.startswith("<t>")


def test_marks_are_two_different_texts() -> None:
    good = EngineConfig(model="m", thinking_marks=("[THINK]", "[/THINK]"), thinking_tokens=5)
    check_engine(good)
    assert good.thinking == Thinking(5, "[THINK]", "[/THINK]") and EngineConfig().thinking == NO_THINKING
    for marks in (("<think>",), ("<think>", "<think>"), ("<think>", " "), ()):
        with pytest.raises(ConfigError, match=r"thinking_marks=.* must be two different texts"):
            check_engine(EngineConfig(model="m", thinking_marks=marks))
    with pytest.raises(ConfigError, match="chat_template_kwargs='no' is not JSON"):
        check_engine(EngineConfig(model="m", chat_template_kwargs="no"))


class Scripted(Engine):
    """Writes given texts, one after the other."""

    def __init__(self, tokenizer: ChatTokenizer, thinking: Thinking, *replies: str | Reply) -> None:
        self.tokenizer, self.thinking = tokenizer, thinking
        self._replies = list(replies)

    @property
    def identity(self) -> dict[str, Any]:
        return {"engine": "scripted", **self.given_settings}

    def answer(self, groups: Sequence[Sequence[Prompt]], sampling: Sampling, *_: Any) -> list[list[Reply]]:
        return [[self._next(sampling) for _ in group] for group in groups]

    def _next(self, sampling: Sampling) -> Reply:
        reply = self._replies.pop(0)
        if isinstance(reply, Reply):
            return reply
        new_tokens = len(self.tokenizer.encode(reply, continues=True))
        return self.reply(
            reply, sampling, finished=True, prompt_tokens=9, new_tokens=new_tokens, opened=self.opens_thinking
        )


def replies_of(engine: Engine, count: int, max_tokens: int) -> list[Reply]:
    prompts = [Prompt(({"role": "user", "content": "Where?"},)) for _ in range(count)]
    return engine.answer([prompts], Sampling(max_tokens))[0]


def test_replies_say_why_they_are_no_answers(model: Path) -> None:
    texts = ("The river", "<think>The tower</think>The river", "<think>The tower", "<think></think>", "", " \n")
    replies = replies_of(Scripted(load_tokenizer(model), NO_THINKING, *texts), len(texts), 50)
    assert [reply.text for reply in replies] == ["The river", "The river", "", "", "", ""]
    assert [reply.no_answer for reply in replies] == [None, None, "only_thinking", "only_thinking", "empty", "empty"]
    tokens = [len(load_tokenizer(model).encode(text, continues=True)) for text in ("<think>The tower</think>", "x")]
    assert replies[1].thinking_tokens == tokens[0] and replies[0].thinking_tokens == 0
    assert Reply("", False, 3, 0, refused="too long").no_answer == "refused"
    assert Reply("I", False, 3, 1, declined="content filter").no_answer == "declined"


def test_an_answer_has_no_more_tokens_than_its_own(model: Path) -> None:
    """Where thinking has tokens of its own and leaves some of them."""
    tokenizer = load_tokenizer(model)
    text = "It stands on the left bank of the river."
    ids = tokenizer.encode(text, continues=True)
    for thinking, expected, finished in (
        (NO_THINKING, text, True),
        (Thinking(100), tokenizer.decode(ids[:4]).strip(), False),
    ):
        (reply,) = replies_of(Scripted(tokenizer, thinking, f"<think>a</think>{text}"), 1, 4)
        assert reply.text == expected and reply.finished == finished


def test_marks_may_be_special_tokens(tmp_path: Path) -> None:
    """As Magistral's, which decoding leaves out."""
    tokenizer = load_tokenizer(make_fast_tokenizer(tmp_path))
    engine = Scripted(tokenizer, Thinking(0, "<|im_start|>", "<|im_end|>"))
    ids = tokenizer.encode("<|im_start|>the tower<|im_end|>the river", continues=False)
    assert tokenizer.decode(ids) == "the towerthe river"
    assert engine.decode(ids) == "<|im_start|>the tower<|im_end|>the river"
    assert Scripted(tokenizer, NO_THINKING).decode(ids) == "the towerthe river"


def test_a_model_in_the_process_thinks(model: Path, tmp_path: Path) -> None:
    """A model of random weights, which ends no answer, has the tokens of both."""
    prompt = Prompt(({"role": "user", "content": "Where?"},), prefix=" The tower")
    plain = TransformersEngine(model, dtype="float32")
    ((before,),) = plain.answer([[prompt]], Sampling(6))
    assert before.new_tokens == 6
    engine = TransformersEngine(model, dtype="float32", thinking=Thinking(7))
    ((reply,),) = engine.answer([[prompt]], Sampling(6))
    assert reply.new_tokens == 13 and not reply.finished
    assert len(engine.tokenizer.encode(reply.text, continues=True)) <= 6
    # The beginning of the answer comes before the thinking, so it ends the question; lengths count it there.
    ((ids,),) = engine.token_rows([[prompt]])
    assert "Where? The tower" in engine.tokenizer.decode(ids) and not engine.tokenizer.decode(ids).endswith("tower")
    assert count_prompt(engine, "Where?", " The tower") == len(ids)
    ((ids,),) = plain.token_rows([[prompt]])
    assert plain.tokenizer.decode(ids).endswith(" The tower")
    # A prompt that opens thinking, and no end of it.
    (tmp_path / "opens").write_text(OPENS)
    opening = TransformersEngine(model, dtype="float32", chat_template=str(tmp_path / "opens"))
    assert opening.opens_thinking and not engine.opens_thinking
    ((reply,),) = opening.answer([[prompt]], Sampling(6))
    assert reply.no_answer == "only_thinking" and reply.text == "" and reply.thinking_tokens > 0


def test_vllm_gets_tokens_for_thinking(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in: vLLM does not install without a GPU. It writes the same for each prompt."""
    from megatron_longpo.engines.vllm_engine import VLLMEngine

    tokenizer, asked = load_tokenizer(model), []
    written = "<think>a</think>The river"
    completion = SimpleNamespace(
        text=written, token_ids=tokenizer.encode(written, continues=True), finish_reason="stop"
    )

    class LLM:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=40))

        def __init__(self, **settings: Any) -> None:
            asked.append(settings)

        def generate(self, prompts: list[Any], parameters: list[Any], **_: Any) -> list[Any]:
            asked.extend(parameters)
            return [SimpleNamespace(outputs=[completion], **prompt) for prompt in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=lambda **more: more))
    engine = VLLMEngine(EngineConfig(engine="vllm", model=str(model), thinking_tokens=30), 100)
    engine.check_ready()
    assert asked[0]["model"] == str(model), "loaded"
    # Memory for the longest row, not for all that the model would take.
    assert asked[0]["max_model_len"] == 100 and asked[0]["gpu_memory_utilization"] == 0.9
    prompts = [Prompt(({"role": "user", "content": text},)) for text in ("Where?", "Where? " * 30)]
    (replies,) = engine.answer([prompts], Sampling(6))
    assert [parameters["max_tokens"] for parameters in asked[1:]] == [36]
    assert [reply.text for reply in replies] == ["The river", ""]
    assert [reply.no_answer for reply in replies] == [None, "refused"] and replies[0].thinking_tokens
    assert engine.identity["thinking"]["tokens"] == 30


def test_only_given_settings_are_in_the_identity(model: Path, tmp_path: Path) -> None:
    assert "thinking" not in TransformersEngine(model).identity
    (tmp_path / "t").write_text(BUILT_IN_TEMPLATES["chatml"] + "{% if enable_thinking %}{% endif %}")
    kwargs = {"enable_thinking": False}
    engine = TransformersEngine(
        model, chat_template=str(tmp_path / "t"), template_kwargs=kwargs, thinking=Thinking(64, "<a>", "<b>")
    )
    assert engine.identity["chat_template_kwargs"] == kwargs
    assert engine.identity["thinking"] == {"tokens": 64, "marks": ["<a>", "<b>"]}


DOCUMENT = {"number": 0, "part": 0, "id": "d", "text": "The tower stands.", "chunks": [[0, 9, 3]], "tokens": 5}


def test_pairs_are_not_made_of_what_is_no_answer(model: Path) -> None:
    config, tokenizer = GenerationConfig(), load_tokenizer(model)
    document = {**DOCUMENT, "chunks": [[0, 9, 3]] * 5}
    asked = {"turns": [{"question": "Where?", "instruction": "Where?"}] * 5}
    replies = (
        "<think>a</think>There.",
        "<think>a",
        "",
        Reply("", True, 3, 0, refused="x"),
        Reply("", True, 3, 0, declined="y"),
    )
    (line,) = answer_short(config, Scripted(tokenizer, NO_THINKING, *replies), [(document, asked)])
    reasons = [turn.get("reason") for turn in line["turns"]]
    assert reasons == [None, "only_thinking_chosen", "empty_chosen", "prompt_refused", "declined_chosen"]
    assert line["turns"][0]["text"] == "There." and line["turns"][4]["detail"] == "y"
    # Thinking is no part of the row.
    assert line["turns"][0]["new_tokens"] == len(tokenizer.encode("There.", continues=True))


def test_questions_are_not_looked_for_in_thinking(model: Path) -> None:
    config, tokenizer = GenerationConfig(), load_tokenizer(model)
    questions = "\n".join(f"{i}. What is the name of the tower {i}?" for i in range(1, 5))
    document = {**DOCUMENT, "chunks": [[0, 9, 3]] * 3}
    replies = (f"<think>1. Is it?\n2. Was it?</think>{questions}", f"<think>{questions}", "")
    (line,) = ask(config, Scripted(tokenizer, NO_THINKING, *replies), [document])
    assert line["turns"][0]["question"] in questions
    assert [turn.get("reason") for turn in line["turns"][1:]] == ["only_thinking_questions", "empty_questions"]
