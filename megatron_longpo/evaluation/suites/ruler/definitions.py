"""RULER's texts and tables, and what differs between its versions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_longpo.evaluation.materials import HOTPOTQA_TASK, SQUAD_TASK

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH_TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} "
    "afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
)
NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
# The same for a question that has one needle as its answer: RULER puts the sentences in the singular.
NIAH_TEMPLATE_OF_ONE = NIAH_TEMPLATE.replace("Some", "A").replace("are all", "is").replace("are", "is")
NIAH_PREFIX_OF_ONE = NIAH_PREFIX.replace("are", "is")
VT_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all "
    "variables that are assigned the value {query} in the text above."
)
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are {assigned} the value "
    "{query}, they are: "
)
CWE_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most "
    "often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FWE_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
    "words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
QA_TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe "
    "following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the answer "
    "and do not output any other words.\n\nQuestion: {query}"
)
QA_PREFIX = " Answer:"

# Where needles may stand, in percent of an essay's sentences: forty places.
DEPTHS = tuple(round(100 * i / 39) for i in range(40))


@dataclass(frozen=True)
class Niah:
    """One of the needle tasks.

    Attributes:
        haystack: ``noise``, ``essay`` or ``needle`` (distracting needles).
        keys, values: kind of the keys and of the values: ``words``, ``numbers`` or ``uuids``.
        key_count: number of keys.
        value_count: needles per key, each with its own value.
        query_count: number of keys that are asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    key_count: int = 1
    value_count: int = 1
    query_count: int = 1


NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", values="uuids"),
    "niah_multikey_1": Niah("essay", key_count=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("essay", value_count=4),
    "niah_multiquery": Niah("essay", key_count=4, query_count=4),
}
# Most tokens of an answer.
MAX_TOKENS = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, SQUAD_TASK: 32, HOTPOTQA_TASK: 32}
TASKS = tuple(MAX_TOKENS)
# Versions of a task's samples and scores, beside the version of the benchmark that they follow. cwe 2: no space between the
# example's answer and its prefix where the benchmark has none.
VERSIONS = {**dict.fromkeys(TASKS, 1), "cwe": 2}
GROUPS = {
    **dict.fromkeys(NIAH, "NIAH"),
    "vt": "VT",
    "cwe": "AGG",
    "fwe": "AGG",
    SQUAD_TASK: "QA",
    HOTPOTQA_TASK: "QA",
}


@dataclass(frozen=True)
class Definitions:
    """What differs between versions of the benchmark.

    Attributes:
        title: what they are, for the report.
        vt_assigned: spelling in the answer prefix of vt.
        vt_separator: what stands between the lines of vt, sentences of noise and assignments.
        vt_example_end: what stands between vt's example and its question.
        vt_example_step: sentences of noise in the example are a multiple of this number.
        vt_example_counts: what the 500 tokens of the example hold: the ``question`` with its prefix; the ``answer``, too, and
            room for another one; or all of that in the chat template (``prompt``).
        vt_example_redrawn: whether the example's number is drawn for each sample, and not once for all.
        vt_independent: whether the places of the example's and of the question's assignments are drawn independently.
        cwe_example_space: what stands between the prefix and the answer in cwe's example.
        fwe_reserves: whether the answer's tokens count in the number of fwe's coded words.
        shuffles_questions: whether questions of QA tasks are always taken in an order drawn by seed.
    """

    title: str
    vt_assigned: str
    vt_separator: str
    vt_example_end: str
    vt_example_step: int
    vt_example_counts: Literal["question", "answer", "prompt"]
    vt_example_redrawn: bool
    vt_independent: bool = True
    cwe_example_space: str = ""
    fwe_reserves: bool = False
    shuffles_questions: bool = False


# By commit of NVIDIA/RULER.
PRESENT = "c3f5e3b"
DEFINITIONS = {
    PRESENT: Definitions(
        title="RULER at commit c3f5e3b (2026-07-22)",
        vt_assigned="assigned",
        vt_separator="\n",
        vt_example_end="\n\n",
        vt_example_step=1,
        vt_example_counts="question",
        vt_example_redrawn=True,
        cwe_example_space=" ",
        fwe_reserves=True,
    ),
    # The state before the changes of 2025-05-13.
    "860f2bd": Definitions(
        title="RULER at commit 860f2bd (2025-01-31)",
        vt_assigned="assgined",
        vt_separator=" ",
        vt_example_end="\n\n\n\n",
        vt_example_step=5,
        vt_example_counts="answer",
        vt_example_redrawn=False,
    ),
}
# Those of folders made by version 0.1, which recorded none: 860f2bd, but for the example's size and number, and the two
# departures that version 0.1 had of its own. For resuming such a folder only.
MIXED = replace(
    DEFINITIONS["860f2bd"],
    title="those of megatron_longpo 0.1, a mixture of RULER before and after 2025-05-13",
    vt_example_step=1,
    vt_example_counts="prompt",
    vt_example_redrawn=True,
    vt_independent=False,
    shuffles_questions=True,
)
