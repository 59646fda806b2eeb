"""RULER (arXiv 2404.06654): its thirteen synthetic tasks, made at exact lengths for a tokenizer.

Templates, answer prefixes, needle kinds, depths, frequencies and scores are the benchmark's, of the version that
``ruler_version`` names (``definitions.py``): the benchmark changed vt, cwe and fwe on 2025-05-13. What differs from either
version:

Lengths
- Units are fitted for each sample, not once for all samples. Where a unit is coarse (a needle of UUIDs, a document of a QA task)
  and would leave 1/25 of the length empty, sentences of noise or the beginning of one more document fill it. So lengths are
  exact, where the benchmark stays up to 2/5 below the length and sometimes a little above it (fwe, by 860f2bd).
- A begin-of-text token that the chat template writes is counted.
- The vt example's size by 860f2bd counts the answer as it stands in the text, not as a Python list.

Questions (qa_1, qa_2)
- If a question does not fit with all its documents, it keeps those that hold its answer; a question whose answer does not fit is
  skipped. (The benchmark's script does not end then.)
- ``ruler_shuffle_questions`` draws their order by seed. (The benchmark takes the first ones of the file; so does the default.)

Draws
- Each sample draws its order of needles, of listed words (cwe, fwe) and of documents; the benchmark uses one permutation for all
  samples. In vt each sample draws the places in its example, too; the benchmark draws them once.
- Needles, words and names come from generators of our own, so samples are not those of the benchmark's seed 42.

Texts
- Sentences of essays are found by a pattern, without a model that would have to be downloaded (NLTK's).
- A depth is ``int(n * depth / 100)`` of n sentences; the benchmark's ``int(n * (depth / 100))`` is the sentence before in one of
  5000 cases.
- No second blank stands where a needle begins the text or two needles stand at one depth.
- For a single answer, "is" replaces "are" in the task's template only; the benchmark also rewrites the chat template around it.
- If a length has room for more common words than there are, pairs of words continue the list (cwe). (The benchmark goes over to
  another list of words at c3f5e3b, and stops at 860f2bd.)

Scores
- 100 samples per task by default, not 500; means are not rounded.

Why not the ruler tasks of lm-evaluation-harness (as of 0.4.13)? Their lengths are not exact: haystacks grow in steps of up to 500
words, and the chat template is not counted. They download essays, questions and a sentence splitter while they load, which needs
the hub. And the harness reads each prompt by itself: nothing shares a haystack, so a needle map of eleven depths costs eleven
times as much reading. Its scorers are an oracle in the tests.
"""
