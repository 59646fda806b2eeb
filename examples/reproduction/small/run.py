"""LongPO on a model that is made here: tokenizer, pretraining, three rounds by several methods, evaluation, tables and a figure.

    python examples/reproduction/small/run.py --folder F                 # everything; rerun to resume
    python examples/reproduction/small/run.py --folder F --until model   # the model and its examination only
    python examples/reproduction/small/run.py --folder F --seeds 2       # the second chain of rounds, beside the first one's run

Every stage is one of the project's command lines, and prints it. A finished stage is not run again, an interrupted one resumes.
Each seed is a chain of its own from the model on: documents, questions that are sampled, held-out part and order of training.

    F/random  F/making/STEP/  F/model       random weights; data and run of each step; the model
    F/questions.jsonl  F/essays/  F/short.*  held-out questions, texts and dialogues
    F/books/seedN/ROUND.jsonl               documents of the rounds
    F/examined/                             the model before any round, also with RoPE changed and nothing else
    F/perplexity/                           all models on the held-out dialogues
    F/rounds/seedN.yaml  F/rounds/seedN/    configuration and folder of `evolve`
    F/results.md  F/results.json  F/results.png  F/results_all.png
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import model as models
import report
import world
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
UNTIL = ("random", "making", "model", "examined", "rounds", "report")
# Seeds of what is drawn: texts of each purpose have their own. The questions that settings were chosen on had 3.
_SEEDS = {"making": 1, "short": 2, "questions": 5, "books": 4}


@dataclass(frozen=True)
class Amounts:
    """How much of everything.

    Attributes:
        size: key of `sizes` in making.yaml.
        making: making step -> factor of its rows; steps that are not named are left out.
        epochs: times that each row is used.
        books: documents per round.
        questions: documents per length that the model is asked about, six questions each.
        seeds: chains of rounds.
        methods: methods of rounds.yaml.
        rounds: rounds of rounds.yaml.
        generate: changes of the pairs' settings.
        evaluate: changes of the evaluations' settings.
        whole: whether the model itself is examined, besides what `evolve` does, and perplexities are measured.
    """

    size: str
    making: Mapping[str, float]
    epochs: float
    books: int
    questions: int
    seeds: int
    methods: tuple[str, ...]
    rounds: tuple[str, ...]
    generate: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = True


# A model that has learnt nothing asks and answers nothing: whatever it writes counts.
_ANYTHING = {
    "questions": {"question_pattern": r"(?s)\A(.+)\Z", "question_tokens": 8},
    "answers": {"answer_tokens": 4, "answer_temperature": 1.0},
    "filters": {"keep_truncated": True, "min_question_words": 1},
}
_STEPS = ("lists", "facts", "essays", "whole")
_ROUNDS = ("1K", "2K", "4K")
_METHODS = ("longpo", "sft", "dpo", "long-reference", "no-nll", "independent", "low-beta", "whole-nll")
AMOUNTS = {
    # By estimate three hours for the model on two cores, and a night for the rounds.
    "full": Amounts(
        "small",
        {"lists": 1, "facts": 4, "essays": 4, "whole": 10},
        1,
        600,
        40,
        3,
        _METHODS,
        _ROUNDS,
    ),
    # Some twenty minutes of one core for the model, and an hour and a half for each chain of rounds.
    "pilot": Amounts("tiny", dict.fromkeys(_STEPS, 1), 1, 240, 24, 3, _METHODS, _ROUNDS),
    # `make demo`: as little as shows what a round does.
    "demo": Amounts(
        "tiny",
        {"lists": 1, "facts": 1, "essays": 0.4},
        1,
        160,
        16,
        1,
        ("longpo",),
        ("1K",),
        evaluate={"evaluate": {"tasks": ["qa"]}, "qa": {"qa_lengths": [256, 512, 1024]}},
        whole=False,
    ),
    # Seconds, for the tests: everything runs, nothing is learnt.
    "smoke": Amounts("tiny", dict.fromkeys(_STEPS, 0.002), 1, 16, 1, 1, ("longpo", "sft"), ("1K",), _ANYTHING),
}


class Reproduction:
    """The stages.

    Args:
        folder: folder of everything that is made.
        amounts: how much of everything.
        processes: processes that training, generation and evaluation are divided among.
        seeds: the chains to run, from 1. Default: all.
    """

    def __init__(self, folder: Path, amounts: Amounts, processes: int = 1, seeds: Sequence[int] = ()) -> None:
        self.folder, self.amounts, self.processes = folder, amounts, processes
        self.seeds = tuple(seeds) or tuple(range(1, amounts.seeds + 1))
        self.until = UNTIL[-1]
        self.making: dict[str, Any] = yaml.safe_load((HERE / "making.yaml").read_text(encoding="utf-8"))
        self.seconds_path = folder / "seconds.json"

    # ---------------------------------------------------------------------------------- running

    def stage(self, name: str, done: Path, work: Callable[[], None]) -> None:
        """Run a stage whose last product is missing."""
        if done.exists():
            print(f"== {name}: already done ({done})", flush=True)
            return
        print(f"== {name}", flush=True)
        began = time.monotonic()
        work()
        seconds = json.loads(self.seconds_path.read_text()) if self.seconds_path.exists() else {}
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began
        self.seconds_path.write_text(json.dumps(seconds, indent=2) + "\n")

    def tool(self, *arguments: object, processes: int = 1) -> None:
        """Run one of the project's commands.

        Args:
            arguments: its words.
            processes: processes that share the work.

        Raises:
            SystemExit: it fails; it has said why.
        """
        words = [*map(str, arguments)]
        print("$ megatron-longpo " + " ".join(words), flush=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        command = [sys.executable, "-m", *(launcher if processes > 1 else []), "megatron_longpo.cli", *words]
        environment.setdefault("OMP_NUM_THREADS", "1")
        code = subprocess.run(command, check=False, env=environment).returncode
        if code:
            sys.exit(code)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "random", trust_remote_code=False)

    @cached_property
    def count(self) -> world.Count:
        """Counts tokens; sentences of essays come again and again."""

        @cache
        def count(text: str) -> int:
            return len(self.tokenizer.encode(text, add_special_tokens=False))

        return count

    # ---------------------------------------------------------------------------------- making

    def make_model(self) -> None:
        """The model: random weights, the making steps, an export."""
        folder, size = self.folder, models.Size(**self.making["sizes"][self.amounts.size])
        start = folder / "random"
        self.stage("random model", start, lambda: models.make_model(start, size, seed=1234))
        if self.until == "random":
            return
        weights = folder / "making" / "checkpoint"
        self.stage("import", weights, lambda: self.tool("convert", "import", "--hf", start, "--output", weights))
        for number, step in enumerate(self.making["steps"]):
            if step["name"] in self.amounts.making:
                weights = self._step(number, step, weights)
        target = folder / "model"
        self.stage(
            "export", target, lambda: self.tool("convert", "export", "--checkpoint", weights, "--output", target)
        )

    def _step(self, number: int, step: Mapping[str, Any], load: Path) -> Path:
        """One making step; the folder of its run."""
        name, rows = step["name"], step["rows"]
        own = self.folder / "making" / name
        own.mkdir(parents=True, exist_ok=True)
        texts = world.essays_of(held_out=False) if rows["essays"] else []
        rng = random.Random(f"{_SEEDS['making']}/{name}")
        count = max(64, int(rows["count"] * self.amounts.making[name]))

        def made() -> Iterable[dict[str, Any]]:
            for _ in range(count):
                shares = {"repeats": rows["repeats"], "listed": rows["listed"]}
                dialogue = world.making_dialogue(texts, rows["tokens"], world.LONGEST_ROW, self.count, rng, **shares)
                yield world.tokenised(dialogue, self.tokenizer)

        self._preprocess(f"making {name}: data", own / "rows.jsonl", own / "data", made)
        run = own / "run"
        config = merged(self.making["defaults"], step.get("train", {}))
        config = merged(
            config,
            {
                "data": {"data_path": str(own / "data"), "seq_length": world.LONGEST_ROW},
                "training": {"train_epochs": self.amounts.epochs, "seed": 1234 + number},
                "checkpoint": {"load": str(load), "save": str(run)},
            },
        )
        # Each process has its part of the batch.
        config["training"]["micro_batch_size"] = max(1, config["training"]["global_batch_size"] // self.processes)
        path = own / "train.yaml"
        write(path, yaml.safe_dump(config))

        def train() -> None:
            self.tool("train", "--config", path, processes=self.processes)
            (run / "done").touch()

        self.stage(f"making {name}: training", run / "done", train)
        return run

    def _preprocess(self, name: str, rows: Path, prefix: Path, made: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Write tokenised rows and make binaries of them."""

        def work() -> None:
            write_rows(rows, made())
            size = len(self.tokenizer)
            self.tool(
                "preprocess", "--input", rows, "--vocab-size", size, "--output-prefix", prefix, "--keep-duplicates"
            )

        self.stage(name, Path(f"{prefix}.json"), work)

    # ---------------------------------------------------------------------------------- examining

    def examine(self) -> None:
        """What the model can do before any round, at all lengths; and with RoPE changed and nothing else."""
        folder = self.folder
        evaluation = merged(rounds_file()["defaults"]["evaluate"], self.amounts.evaluate)
        if self.amounts.whole:
            self._evaluate("model before any round", folder / "model", folder / "examined" / "model", evaluation)
        for each in self._rounds():
            self._stretch(each, folder / "model", f"rope-{each['name']}", evaluation)

    def examine_origins(self, seed: int) -> None:
        """The models that the second and later rounds begin with, with the round's RoPE and nothing else."""
        evaluation = merged(rounds_file()["defaults"]["evaluate"], self.amounts.evaluate)
        rounds = self._rounds()
        for before, each in pairwise(rounds):
            origin = self.folder / "rounds" / f"seed{seed}" / before["name"] / self.amounts.methods[0] / "model"
            self._stretch(each, origin, f"seed{seed}-rope-{each['name']}", evaluation)

    def _stretch(self, round_: Mapping[str, Any], model: Path, name: str, evaluation: Mapping[str, Any]) -> None:
        """Change a model's RoPE as a round does, and examine it."""
        stretched = self.folder / "stretched" / name
        checkpoint = stretched.with_name(f"{name}.checkpoint")

        def work() -> None:
            if not checkpoint.exists():
                rope = ("--rotary-base", round_["train"]["model"]["rotary_base"])
                self.tool("convert", "import", "--hf", model, "--output", checkpoint, *rope)
            self.tool("convert", "export", "--checkpoint", checkpoint, "--output", stretched)

        self.stage(f"{name}: RoPE changed, nothing else", stretched, work)
        self._evaluate(name, stretched, self.folder / "examined" / name, evaluation)

    def _questions(self) -> None:
        folder = self.folder
        lengths = merged(rounds_file()["defaults"]["evaluate"], self.amounts.evaluate)["qa"]["qa_lengths"]
        path = folder / "questions.jsonl"
        rng = random.Random(f"{_SEEDS['questions']}")
        self.stage(
            "held-out questions",
            path,
            lambda: write_rows(
                path,
                (q for n in lengths for q in world.examination(n, self.amounts.questions, self.count, rng)),
            ),
        )
        texts = folder / "essays"
        self.stage("held-out essays", texts / "essays.txt", lambda: write(texts / "essays.txt", held_out_text()))
        words = folder / "words.txt"
        self.stage("words", words, lambda: write(words, "\n".join(world.all_words()) + "\n"))
        if not self.amounts.whole:
            return
        rng_short = random.Random(f"{_SEEDS['short']}")

        def dialogues() -> Iterable[dict[str, Any]]:
            for _ in range(25 * self.amounts.questions):
                dialogue = world.making_dialogue(
                    world.essays_of(held_out=True), 440, world.LONGEST_ROW, self.count, rng_short, repeats=0.0
                )
                yield world.tokenised(dialogue, self.tokenizer)

        self._preprocess("held-out dialogues", folder / "short.jsonl", folder / "short", dialogues)

    def _evaluate(self, name: str, model: Path, output: Path, evaluation: Mapping[str, Any]) -> None:
        config = merged(evaluation, {"engine": {"model": str(model)}, "evaluate": {"output": str(output)}})
        config = merged(config, self._materials())
        path = self.folder / "examined" / f"{output.name}.yaml"

        def work() -> None:
            write(path, yaml.safe_dump(config))
            self.tool("evaluate", "--config", path, processes=self.processes)
            (output / "done").touch()

        self.stage(name, output / "done", work)

    def _materials(self) -> dict[str, Any]:
        """Files of the evaluation."""
        return {
            "qa": {"qa_data": str(self.folder / "questions.jsonl")},
            "ruler": {"haystack": [str(self.folder / "essays")], "words": str(self.folder / "words.txt")},
        }

    # ---------------------------------------------------------------------------------- rounds

    def run_rounds(self, seed: int) -> None:
        """Documents, and `evolve` on them."""
        config = self.rounds(seed)
        for each in config["rounds"]:
            documents = each["generate"]["documents"]
            path = Path(documents["documents"][0])
            rng = random.Random(f"{_SEEDS['books']}/{seed}/{each['name']}")
            shortest, longest = documents["min_document_tokens"], documents["max_document_tokens"]

            def books(path: Path = path, rng: random.Random = rng, low: int = shortest, high: int = longest) -> None:
                # Line feeds between paragraphs are not counted: some room for them.
                lengths = (
                    rng.randint(low + (high - low) // 4, high - (high - low) // 4) for _ in range(self.amounts.books)
                )
                write_rows(path, ({"text": world.book(n, self.count, rng)} for n in lengths))

            self.stage(f"documents of {each['name']}, seed {seed}", path, books)
        path = self.folder / "rounds" / f"seed{seed}.yaml"
        write(path, yaml.safe_dump(config, sort_keys=False))
        # It knows by itself what is done.
        self.tool("evolve", "--config", path)
        self.tool("evolve", "report", "--config", path)

    def perplexities(self) -> None:
        """NLL of the held-out dialogues of at most 512 tokens, for every model that is there."""
        folder = self.folder
        found = {"model": folder / "model"}
        found |= {path.name: path for path in sorted((folder / "stretched").glob("rope-*")) if path.suffix == ""}
        for seed in self.seeds:
            for path in sorted((folder / "rounds" / f"seed{seed}").glob("*/*/model")):
                found["-".join(path.relative_to(folder / "rounds").parts[:-1])] = path
        for name, model in found.items():
            output = folder / "perplexity" / name

            def work(model: Path = model, output: Path = output) -> None:
                pairs = ("--tasks", "preference", "--pairs", folder / "short", "--dtype", "float32")
                self.tool("evaluate", *pairs, "--model", model, "--output", output)

            self.stage(f"perplexity of {name}", output / "results.json", work)

    def _rounds(self) -> list[dict[str, Any]]:
        """Those of rounds.yaml that are asked for."""
        return [each for each in rounds_file()["rounds"] if each["name"] in self.amounts.rounds]

    def rounds(self, seed: int) -> dict[str, Any]:
        """rounds.yaml with this folder's paths and a seed."""
        folder, config = self.folder, rounds_file()
        methods = {name: config["methods"][name] for name in self.amounts.methods}
        rounds = self._rounds()
        for each in rounds:
            path = folder / "books" / f"seed{seed}" / f"{each['name']}.jsonl"
            each["generate"]["documents"]["documents"] = [str(path)]
            each["methods"] = {name: changes for name, changes in each["methods"].items() if name in methods}
        number = 1233 + seed
        seeds = {"generate": {"run": {"seed": number}}, "train": {"training": {"seed": number}}}
        own = {"evaluate": merged(self._materials(), self.amounts.evaluate), "generate": self.amounts.generate}
        return {
            "evolve": {
                "model": str(folder / "model"),
                "output": str(folder / "rounds" / f"seed{seed}"),
                "nproc_per_node": self.processes,
                "held_out_fraction": 0.05,
                "seed": number,
            },
            "methods": methods,
            "defaults": merged(merged(config["defaults"], own), seeds),
            "rounds": rounds,
        }

    def run(self, until: str) -> None:
        """All stages up to one."""
        self.until = until
        self.folder.mkdir(parents=True, exist_ok=True)
        self.make_model()
        if until in ("random", "making", "model"):
            return
        self._questions()
        self.examine()
        if until != "examined":
            for seed in self.seeds:
                self.run_rounds(seed)
                self.examine_origins(seed)
        if self.amounts.whole:
            self.perplexities()
        report.write(self.folder)
        if until == "report":
            report.show(self.folder)


def rounds_file() -> dict[str, Any]:
    """Content of rounds.yaml."""
    content: dict[str, Any] = yaml.safe_load((HERE / "rounds.yaml").read_text(encoding="utf-8"))
    return content


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the second's values over the first's."""
    result = dict(first)
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def held_out_text() -> str:
    """The essays that are kept for examining."""
    return "\n\n".join(" ".join(essay) for essay in world.essays_of(held_out=True)) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file that is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines that are complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--amounts", choices=AMOUNTS, default="full", help="how much of everything")
    parser.add_argument("--until", choices=UNTIL, default="report", help="last stage")
    parser.add_argument("--processes", type=int, default=2, help="processes that share the work; about one per core")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=(), help="chains of rounds to run, from 1 (default: all)"
    )
    a = parser.parse_args()
    Reproduction(a.folder.resolve(), AMOUNTS[a.amounts], a.processes, a.seeds).run(a.until)


if __name__ == "__main__":
    main()
