"""Needle map: is what stands at some depth of a long text found? Lengths by depths, drawn as a heat map.

A haystack of essays holds needles as RULER words them (``niah_multikey`` with a key a depth). With ``shared`` haystacks all
depths of a trial are asked of one text, which an engine reads once; with ``single`` each question has a haystack of its own with
one needle, as in the classic map, and an engine that keeps prefixes reads again from the needle on.
"""

from __future__ import annotations

import bisect
import itertools
import random

from megatron_longpo.errors import DataError
from megatron_longpo.evaluation.ruler import (
    NEEDLE,
    NIAH_PREFIX,
    NIAH_TEMPLATE,
    Materials,
    repeated,
    sentences_of,
)
from megatron_longpo.evaluation.samples import CountPrompt, EvalSample, largest_fit

VERSION = 1
KINDS = ("shared", "single")
MAX_TOKENS = 32


def depths_of(count: int) -> list[float]:
    """Evenly from 0 to 100, in percent."""
    return [round(100 * i / (count - 1), 1) for i in range(count)] if count > 1 else [50.0]


class NeedleMap:
    """Makes the questions of a cell.

    Args:
        materials: the essays.
        count: tokens of a prompt.
        seed: of all samples.
        depths: how many.
        kind: one of ``KINDS``.
    """

    def __init__(self, materials: Materials, count: CountPrompt, seed: int, depths: int, kind: str) -> None:
        self.materials, self.count, self.seed, self.kind = materials, count, seed, kind
        self.depths = depths_of(depths)
        self._template = NIAH_TEMPLATE.replace("Some", "A").replace("are all", "is").replace("are", "is")
        self._prefix = NIAH_PREFIX.replace("are", "is")

    def trial(self, length: int, trial: int) -> list[list[EvalSample]]:
        """All depths of one trial; the samples of a group share their haystack.

        Raises:
            DataError: the needles alone are longer.
        """
        rng = random.Random(f"{self.seed}/needle/{length}/{trial}")
        first, second = self.materials.key_parts
        keys: dict[str, None] = {}
        while len(keys) < len(self.depths):
            keys[f"{rng.choice(first)}-{rng.choice(second)}"] = None
        needles = [(key, str(rng.randint(10**6, 10**7 - 1))) for key in keys]
        # A trial begins its haystack elsewhere.
        offset = rng.randrange(len(self.materials.essay_words))
        both = list(zip(needles, self.depths, strict=True))
        if self.kind == "shared":
            return [self._ask(length, trial, list(range(len(both))), both, offset)]
        return [self._ask(length, trial, [i], [pair], offset) for i, pair in enumerate(both)]

    def _ask(
        self,
        length: int,
        trial: int,
        numbers: list[int],
        needles: list[tuple[tuple[str, str], float]],
        offset: int,
    ) -> list[EvalSample]:
        words = self.materials.essay_words
        turned = words[offset:] + words[:offset]

        def build(count: int) -> str:
            sentences = sentences_of(repeated(turned, count))
            # Sentences are of unequal length: a depth is one of the text.
            ends = list(itertools.accumulate((len(s) + 1 for s in sentences), initial=0))
            parts: list[str] = []
            last = 0
            for (key, value), depth in needles:
                after = bisect.bisect_left(ends, ends[-1] * depth / 100)
                place = min(
                    (i for i in (after - 1, after) if i >= 0), key=lambda i: abs(ends[i] - ends[-1] * depth / 100)
                )
                parts += [*sentences[last:place], NEEDLE.format(kind="numbers", key=key, value=value)]
                last = place
            return " ".join([*parts, *sentences[last:]])

        def prompt(context: str, key: str) -> tuple[str, str]:
            message = self._template.format(kind="number", context=context, query=key)
            return message, self._prefix.format(kind="number", query=key)

        longest = max((key for (key, _), _ in needles), key=lambda key: self.count(key, ""))
        try:
            _, context, _ = largest_fit(
                build,
                lambda context: self.count(*prompt(context, longest)),
                # Questions differ by some tokens of their keys.
                length - MAX_TOKENS - 8,
                start=length * 3 // 4,
            )
        except DataError as error:
            raise DataError(f"needle at {length} tokens: {error}; ask for longer samples or fewer depths") from None
        samples = []
        for number, ((key, value), depth) in zip(numbers, needles, strict=True):
            message, prefix = prompt(context, key)
            samples.append(
                EvalSample(
                    suite="needle",
                    task=f"depth {depth:g}",
                    length=length,
                    index=trial,
                    message=message,
                    prefix=prefix,
                    references=(value,),
                    scorer="string_match_all",
                    max_tokens=MAX_TOKENS,
                    prompt_tokens=self.count(message, prefix),
                    details={"depth": depth, "number": number},
                )
            )
        return samples
