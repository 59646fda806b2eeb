"""A model generates its own short-to-long pairs from plain documents, in a first simple form.

For each document: a chunk of it, a question that the model asks about the chunk, its answer on the chunk (chosen) and its
answer on the whole document (rejected); METHOD's recipe with one question a chunk, greedy answers, and one process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_longpo.errors import DataError
from megatron_longpo.generation.chat import ChatTokenizer, FastChatTokenizer, user_message

QUESTION_PROMPT = (
    "Write one clear question that can be answered from the text above, about a fact or an idea in it. "
    "Reply with the question only."
)
LEAD_IN = "Based on the preceding text, answer the question: "
REFUSALS = ("i'm sorry", "i am sorry", "i cannot", "i can't", "as an ai", "unable to answer")


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made; lengths in tokens.

    Attributes:
        context_tokens: documents are cut to at most this, at a sentence's end; shorter than half of it, they are passed
            over.
        chunk_tokens: size of a chunk, whole sentences.
        turns: chunks, and so turns, a document.
        question_tokens, answer_tokens: most tokens of a question and of an answer.
        temperature, top_p: of the questions; answers are greedy.
        seed: of the chunks and questions.
    """

    context_tokens: int = 2048
    chunk_tokens: int = 512
    turns: int = 2
    question_tokens: int = 48
    answer_tokens: int = 96
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0


class TransformersEngine:
    """Greedy or sampled continuation by a transformers model on this machine.

    Args:
        path: model folder with tokenizer.
        dtype: of the weights.

    Raises:
        DataError: the folder holds no model that transformers loads.
    """

    def __init__(self, path: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
        from transformers import AutoModelForCausalLM

        self.tokenizer: ChatTokenizer = FastChatTokenizer(Path(path), None)
        try:
            self.model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            detail = " ".join(str(error).split())[:300]
            raise DataError(f"--model {path}: transformers cannot load it ({detail}); give a model folder") from None
        self.model.eval()

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[str, bool]:
        """Text that follows a prompt, and whether it ended by itself. Temperature 0 is greedy."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        cache: Any = None
        produced: list[int] = []
        finished = False
        with torch.inference_mode():
            while len(produced) < max_tokens:
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                token = _pick(out.logits[0, -1].float(), temperature, top_p, generator)
                if token in self.tokenizer.special_ids:
                    finished = True
                    break
                produced.append(token)
                ids = torch.tensor([[token]], device=self.model.device)
        return self.tokenizer.decode(produced).strip(), finished


def _pick(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    # Nucleus sampling (arXiv 1904.09751): the smallest set of tokens with probability top_p.
    keep = probabilities.cumsum(0) - probabilities < top_p
    chosen = torch.multinomial(probabilities * keep, 1, generator=generator)
    return int(order[chosen])


def read_documents(paths: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """(name, text) of text files; a folder stands for its .txt and .md files.

    Raises:
        DataError: a path that is not there, or nothing to read.
    """
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"--documents {path}: there is no such file or folder")
    if not files:
        raise DataError(f"--documents {', '.join(map(str, paths))}: no .txt or .md file there")
    for path in files:
        yield path.name, path.read_text(encoding="utf-8", errors="replace")


# The end of a paragraph, or of a sentence; essays scraped from the web run "sentence.Next sentence" together.
_UNIT_END = re.compile(r"\n\s*\n|[.!?][\"'”’)]*(?=\s|[A-Z])")


class Document:
    """A text in units of sentences, with their lengths in tokens.

    Args:
        text: the text.
        count: tokens of a piece of text.
    """

    def __init__(self, text: str, count: Callable[[str], int]) -> None:
        self.text = text
        ends = [m.end() for m in _UNIT_END.finditer(text)]
        if not ends or ends[-1] < len(text.rstrip()):
            ends.append(len(text.rstrip()))
        starts = [0, *ends[:-1]]
        spans = [(s + len(text[s:e]) - len(text[s:e].lstrip()), e) for s, e in zip(starts, ends, strict=True)]
        self.spans = [(s, e) for s, e in spans if s < e]
        self.tokens = [count(text[s:e]) for s, e in self.spans]

    def run(self, first: int, tokens: int) -> str:
        """The longest run of whole units from unit ``first`` with at most so many tokens; one unit at least."""
        last, total = first, self.tokens[first]
        while last + 1 < len(self.spans) and total + self.tokens[last + 1] <= tokens:
            last += 1
            total += self.tokens[last]
        return self.text[self.spans[first][0] : self.spans[last][1]]

    def starts(self, tokens: int) -> int:
        """Units from which at least so many tokens are left (one at least)."""
        left = 0
        for number in range(len(self.spans) - 1, -1, -1):
            left += self.tokens[number]
            if left >= tokens:
                return number + 1
        return 1


def make_pairs(
    documents: Sequence[tuple[str, str]],
    engine: TransformersEngine,
    output: Path,
    settings: PairSettings,
    *,
    log: Callable[[str], None],
) -> dict[str, int]:
    """Write preference JSONL, one document a line; documents that a broken-off run has written are not made again.

    Returns:
        Counts: documents, turns, and turns or documents dropped by reason.
    """
    counts: dict[str, int] = {}

    def tally(what: str) -> None:
        counts[what] = counts.get(what, 0) + 1

    def count(text: str) -> int:
        return len(engine.tokenizer.encode(text, continues=False))

    partial = output.with_name(output.name + ".partial")
    done = _finished(partial)
    with open(partial, "a", encoding="utf-8") as stream:
        for number, (name, text) in enumerate(documents, 1):
            identity = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
            if identity in done:
                tally("documents before")
                continue
            document = Document(text, count)
            context = document.run(0, settings.context_tokens) if document.spans else ""
            if sum(document.tokens) < settings.context_tokens // 2:
                tally("document too short")
                continue
            turns = _turns(context, identity, engine, settings, count, tally)
            if turns:
                stream.write(
                    json.dumps({"id": identity, "context": context, "turns": turns}, ensure_ascii=False) + "\n"
                )
                stream.flush()
                tally("documents")
                log(
                    f"document {number}/{len(documents)} {name}: {len(turns)} pair(s); asked: {turns[0]['instruction'][-100:]}"
                )
    os.replace(partial, output)
    return counts


def _finished(partial: Path) -> set[str]:
    """Identities of whole lines; a half-written last line is cut off."""
    if not partial.exists():
        return set()
    whole = []
    for line in partial.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if not line.endswith("\n"):
                break
            whole.append((json.loads(line)["id"], line))
        except (ValueError, KeyError, TypeError):
            break
    partial.write_text("".join(line for _, line in whole), encoding="utf-8")
    return {identity for identity, _ in whole}


def _turns(
    context: str,
    identity: str,
    engine: TransformersEngine,
    settings: PairSettings,
    count: Callable[[str], int],
    tally: Callable[[str], None],
) -> list[dict[str, str]]:
    seed = int(hashlib.sha256(f"{settings.seed} {identity}".encode()).hexdigest()[:8], 16)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    document = Document(context, count)
    starts = rng.permutation(document.starts(settings.chunk_tokens))[: settings.turns]
    turns = []
    for start in sorted(int(s) for s in starts):
        chunk = document.run(start, settings.chunk_tokens)
        question = _ask(chunk, engine, settings, generator)
        if question is None:
            tally("no question")
            continue
        instruction = LEAD_IN + question
        answers = []
        for text in (chunk, context):
            answer, _ = engine.generate(
                engine.tokenizer.prompt([user_message(text, instruction)]), settings.answer_tokens
            )
            answers.append(answer)
        reason = _why_not(answers[0], answers[1])
        if reason:
            tally(reason)
            continue
        tally("turns")
        turns.append({"instruction": instruction, "short_context": chunk, "chosen": answers[0], "rejected": answers[1]})
    return turns


def _ask(chunk: str, engine: TransformersEngine, settings: PairSettings, generator: torch.Generator) -> str | None:
    """A question about a chunk, in the model's words; None where none of three tries is one."""
    prompt = engine.tokenizer.prompt([user_message(chunk, QUESTION_PROMPT)])
    told = {word.strip(".,").lower() for word in QUESTION_PROMPT.split()}
    words_of_chunk = set(re.findall(r"[a-z]{5,}", chunk.lower()))
    for _ in range(3):
        asked, _ = engine.generate(
            prompt,
            settings.question_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            generator=generator,
        )
        line = next((part for part in asked.splitlines() if "?" in part), "")
        # Small models begin with "A question could be: ...".
        question = line[: line.find("?") + 1].rsplit(": ", 1)[-1].strip('*"“ ')
        words = re.findall(r"[a-z]+", question.lower())
        about_the_chunk = len(words_of_chunk & set(words) - told) >= 2
        if 4 <= len(words) <= 40 and about_the_chunk and sum(w in told for w in words) <= len(words) * 0.6:
            return question
    return None


def _why_not(chosen: str, rejected: str) -> str | None:
    if not chosen or not rejected:
        return "empty answer"
    if chosen == rejected:
        return "identical answers"
    if any(phrase in chosen.lower() for phrase in REFUSALS):
        return "refusal"
    words = chosen.split()
    if len(words) >= 30 and len({tuple(words[i : i + 3]) for i in range(len(words) - 2)}) < len(words) * 0.5:
        return "repetitive answer"
    return None
