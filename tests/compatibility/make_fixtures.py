"""Write tests/compatibility/a8ab853.tar.gz: files of commit a8ab853, which later versions must still accept.

Run it at that commit only, in an environment with the versions of its constraints.txt:

    git worktree add ../a8ab853 a8ab853
    PYTHONPATH=../a8ab853 python tests/compatibility/make_fixtures.py

The command lines of that commit write everything, with relative paths, from a tiny model and tiny texts. The archive holds

    before/          inputs, finished outputs, and outputs of commands that were killed halfway
    after/           outputs of the same commands, uninterrupted
    commands.json    these commands, to be rerun in before/
    flags.json       every flag in the --help of each command line
    settings/        per configuration: its defaults, a YAML file and flags that set every key; the examples

Running it twice gives the same content, except for measured times, dates and the random names of training checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import importlib.util
import io
import json
import os
import pkgutil
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

# A fork copies only the thread that forks, so there must be no other.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", JE_ARROW_MALLOC_CONF="background_thread:false")
os.environ.update(HF_HUB_OFFLINE="1", COLUMNS="100")

COMMIT = "a8ab853"
TRAIN = ["-m", "megatron_longpo.train"]
CONVERT = ["tools/convert_checkpoint.py"]
PREPROCESS = ["tools/preprocess_preference_data.py"]
GENERATE = ["tools/generate_preference_data.py"]
EVALUATE = ["tools/evaluate.py"]

# Every key of every section, with a value other than the default; of two keys that exclude each other, one is null.
SETTINGS = {
    "train": """
data: {data_path: data, valid_data_path: held_out, shuffle: false, turns: independent, prefix_sharing: false,
  seq_length: 4096, verify_data: false}
objective: {objective: longpo, beta: 0.2, preference_weight: 0.5, nll_scope: response, loss_type: sigmoid,
  label_smoothing: 0.25}
reference: {reference: online, reference_load: ckpt, reference_model: resident, reference_rotary_base: 20000.0,
  reference_cache: cache, reference_max_tokens: 2048}
model: {rotary_base: 40000.0, rope_type: yarn, rotary_scaling_factor: 4.0, original_max_position_embeddings: 512,
  attention_factor: 1.25, beta_fast: 16.0, beta_slow: 2.0, low_freq_factor: 1.5, high_freq_factor: 3.0,
  max_position_embeddings: 8192, make_vocab_size_divisible_by: 64, logprob_chunk_bytes: 1048576}
parallel: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, num_layers_per_virtual_pipeline_stage: 1,
  virtual_pipeline_model_parallel_size: null, context_parallel_size: 2, cp_comm_type: allgather, sequence_parallel: true,
  use_distributed_optimizer: true, overlap_grad_reduce: true, distributed_timeout_minutes: 30}
training: {micro_batch_size: 2, global_batch_size: 16, train_iters: 12, train_epochs: 2.5, eval_interval: 4, eval_iters: 3,
  skip_train: true, bf16: true, recompute_granularity: selective, recompute_method: block, recompute_num_layers: 2,
  recompute_modules: [core_attn, mlp], seed: 7, manual_gc_interval: 5}
optimizer: {optimizer: rmsprop, lr: 0.001, min_lr: 0.0001, lr_decay_style: WSD, lr_decay_iters: 10, lr_warmup_fraction: null,
  lr_warmup_iters: 2, lr_warmup_init: 0.0002, lr_wsd_decay_iters: 3, lr_wsd_decay_style: cosine, weight_decay: 0.1,
  adam_beta1: 0.8, adam_beta2: 0.95, adam_eps: 1.0e-06, rmsprop_alpha: 0.9, rmsprop_eps: 1.0e-06, clip_grad: 0.5}
checkpoint: {load: ckpt, save: run, save_interval: 3, async_save: true, keep_last: 2, no_save_optim: true, exit_interval: 6,
  exit_duration_in_mins: 1.5}
logging: {log_interval: 2, tensorboard: false, wandb_project: project, wandb_exp_name: name, plot_interval: 10}
""",
    "generate": """
documents: {documents: [texts, more/*.txt], domain: book, text_column: content, seq_length: 8192, min_document_tokens: 1000,
  max_document_tokens: 6000, overlong: split, min_chunk_tokens: 300, max_chunk_tokens: 900, chunks_per_document: 2,
  max_documents: 50, workers: 2}
questions: {questions_per_chunk: 3, question_prompt: 'Ask {count} questions.', question_pattern: '^(.+)$',
  question_tokens: 64, question_temperature: 0.5, question_top_p: 0.8, question_tries: 2, lead_ins: ['So, ', 'Then, ']}
answers: {answer_tokens: 128, answer_temperature: 0.25, answer_top_p: 0.75, long_answer_tokens: 256,
  long_answer_temperature: 0.5, long_answer_top_p: 0.5, rotary_base: 40000.0, rope_type: yarn, rotary_scaling_factor: 4.0,
  original_max_position_embeddings: 512}
engine: {engine: vllm, model: model, tokenizer: tokenizer, chat_template: chatml, dtype: bfloat16, batch_size: 8,
  documents_at_once: 2, prefill_tokens: 4096, tensor_parallel_size: 2, base_url: 'http://localhost:9000/v1',
  api_key_variable: MY_KEY, concurrency: 4, timeout_seconds: 30.5, retries: 2}
filters: {refusals: ["i won't", 'no idea'], refusal_characters: 100, refuse_rejected_too: true, keep_truncated: true,
  min_answer_characters: 2, max_repeated_ngrams: 0.25, max_compression: 5.0, max_quoted_words: 0.5, min_question_words: 2,
  max_question_words: 40, short_seq_length: 2048, languages: [en, fr], min_language_probability: 0.75}
run: {output: generated.jsonl, seed: 7, rank: 1, world_size: 3, report_samples: 5}
""",
    "evaluate": """
evaluate: {tasks: [ruler, needle], lengths: [2K, '3000'], output: evaluation, seed: 7, samples: 10, rank: 1, world_size: 3}
engine: {engine: vllm, model: model, tokenizer: tokenizer, chat_template: chatml, dtype: bfloat16, batch_size: 8,
  documents_at_once: 2, prefill_tokens: 4096, tensor_parallel_size: 2, base_url: 'http://localhost:9000/v1',
  api_key_variable: MY_KEY, concurrency: 4, timeout_seconds: 30.5, retries: 2}
ruler: {ruler_tasks: [vt, cwe], haystack: [texts], words: words.txt, squad: squad.json, hotpotqa: hotpot.json}
infinitebench: {infinitebench: books, infinitebench_tasks: [longbook_qa_eng], infinitebench_samples: 5,
  infinitebench_prompts: base}
needle: {needle_depths: 5, needle_trials: 3, needle_haystack: single}
short: {short_tasks: [mmlu], short_data: local, short_limit: 20, short_batch_size: 2}
preference: {pairs: held_out, reference_model: reference, beta: 0.2, context_parallel_size: 2, tensor_model_parallel_size: 2}
""",
}
CONFIGURED = {"train": TRAIN, "generate": GENERATE, "evaluate": EVALUATE}
EXAMPLES = {
    "demo.yaml": "train",
    "longpo_128k.yaml": "train",
    "demo_pairs.yaml": "generate",
    "pairs_128k.yaml": "generate",
    "demo_evaluation.yaml": "evaluate",
}

GENERATION = """
documents: {seq_length: 700, min_chunk_tokens: 60, max_chunk_tokens: 150, min_document_tokens: 120, chunks_per_document: 2,
  overlong: cut}
questions: {questions_per_chunk: 1, question_pattern: '(.+)', question_tokens: 8}
answers: {answer_tokens: 12}
engine: {dtype: float32, documents_at_once: 2}
# The model's weights are random, and so are its answers.
filters: {keep_truncated: true, min_question_words: 0, max_quoted_words: 1.0, max_compression: 100.0}
"""

_TRAIN = "-m megatron_longpo.train --data-path data --load ckpt --global-batch-size 4 --no-tensorboard"
_EVALUATE = "tools/evaluate.py --model model --dtype float32 --output evaluation"
_COMMAND_LINES = {
    "convert": "tools/convert_checkpoint.py import --hf model --output ckpt",
    "preprocess": "tools/preprocess_preference_data.py --input pairs.jsonl --tokenizer model --output-prefix data",
    "preprocess, killed": "tools/preprocess_preference_data.py --input pairs.jsonl --tokenizer model --output-prefix killed",
    "train": f"""{_TRAIN} --save run --valid-data-path held_out --train-iters 6 --save-interval 3 --eval-interval 3 --lr 1e-3
        --adam-eps 1e-4 --lr-warmup-iters 2 --preference-weight 0.5 --use-distributed-optimizer""",
    "train, rmsprop": f"{_TRAIN} --save rmsprop --train-iters 2 --optimizer rmsprop --lr 1e-3 --rmsprop-eps 1e-4",
    "reference": f"{_TRAIN} --save other --train-iters 1 --reference-cache cache",
    "export": "tools/convert_checkpoint.py export --checkpoint run --output trained",
    "generate": """tools/generate_preference_data.py --config generation.yaml --documents texts --model model
        --output generated.jsonl""",
    "evaluate": f"""{_EVALUATE} --tasks ruler,needle,infinitebench,preference --lengths 1500 --samples 3
        --ruler-tasks niah_single_2,vt,qa_1,qa_2 --haystack texts --squad squad.jsonl --hotpotqa hotpot.json
        --needle-depths 3 --needle-trials 1 --infinitebench books --infinitebench-tasks longbook_qa_eng --pairs held_out""",
    "evaluate, short": f"""{_EVALUATE} --tasks short --short-tasks arc_challenge --short-data local
        --short-batch-size 1""",
}
COMMANDS = {name: line.split() for name, line in _COMMAND_LINES.items()}
# Methods during which commands are killed.
POINTS = {
    "sample": "megatron_longpo.data.indexed SampleWriter add",
    "reference": "megatron_longpo.reference ReferenceCache write_partial",
    "step": "megatron_longpo.metrics Reporter step",
    "stage": "megatron_longpo.generation.stages Stage append",
    "answers": "megatron_longpo.evaluation.runner Results add",
}
# The outputs in after/ that the tests need.
AFTER = (
    *("run/metrics.jsonl", "run/validation.jsonl", "trained/model.safetensors", "rmsprop/metrics.jsonl"),
    *("cache", "generated.jsonl", "generated.jsonl.rejects.jsonl", "evaluation/results.json"),
    *(f"evaluation/{suite}/samples.jsonl" for suite in ("ruler", "needle", "infinitebench", "preference", "short")),
)

DOCUMENTS = 8
VOCABULARY = "the tower was built and stands on left bank of river people come to see it from far away most climb view"
WORDS = VOCABULARY.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / f"{COMMIT}.tar.gz", help="archive to write"
    )
    arguments = parser.parse_args()
    tree = tree_of_commit()
    for name in ("transformers.models.llama.modeling_llama", "matplotlib.pyplot", "tyro"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages([str(tree / "megatron_longpo")], "megatron_longpo."):
        if module.name != "megatron_longpo.train":
            importlib.import_module(module.name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(tree, folder)
        pack(folder, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


def tree_of_commit() -> Path:
    """Root of the tree that Python imports megatron_longpo from.

    Raises:
        SystemExit: it is not a checkout of the commit.
    """
    spec = importlib.util.find_spec("megatron_longpo")
    tree = Path(spec.origin or "").parent.parent if spec is not None else Path()
    old_layout = all((tree / "megatron_longpo" / name).is_file() for name in ("trainer.py", "generation/chat.py"))
    head = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    if not old_layout or not head.startswith(COMMIT):
        raise SystemExit(
            f"error: megatron_longpo is imported from {tree}, which is not commit {COMMIT}; check that commit out and put it "
            "into PYTHONPATH"
        )
    return tree.resolve()


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------


def run(tree: Path, command: list[str], folder: Path) -> str:
    """Run a command in a folder and return its standard output."""
    print(folder.name, " ".join(command), flush=True)
    code, stdout, stderr = in_child(lambda: execute(tree, command, folder))
    if code:
        raise SystemExit(f"exit status {code}\n{stdout}\n{stderr}")
    return stdout


def kill(tree: Path, command: list[str], folder: Path, point: str, calls: int) -> None:
    """Run a command in a folder and kill it after a number of calls of the method that ``point`` names.

    Counting calls instead of seconds kills it at the same point on every machine.
    """
    print(folder.name, " ".join(command), f"(killed at {point} {calls})", flush=True)

    def action() -> None:
        kill_after(*POINTS[point].split(), calls)
        execute(tree, command, folder)

    code, stdout, stderr = in_child(action)
    if code != -signal.SIGKILL:
        raise SystemExit(f"exit status {code}\n{stdout}\n{stderr}")


def in_child(action: Callable[[], None]) -> tuple[int, str, str]:
    """Run something in a forked process: its exit status, standard output and standard error.

    The parent has paid the imports, which take longer than all the commands together.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            code = 1
            try:
                action()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        # Its children, such as megatron-core's checkpoint writer, survive when it is killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        found = []
        for stream in (stdout, stderr):
            stream.seek(0)
            found.append(stream.read().decode())
        return os.waitstatus_to_exitcode(status), found[0], found[1]


def execute(tree: Path, command: list[str], folder: Path) -> None:
    """Do in this process what ``python COMMAND`` does in a folder."""
    os.chdir(folder)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(tree / command[0]), *command[1:]]
        sys.path.insert(0, str(tree / "tools"))
        runpy.run_path(sys.argv[0], run_name="__main__")


def kill_after(module: str, owner: str, name: str, calls: int) -> None:
    """Make a method kill this process at the end of its ``calls``-th call."""
    target = getattr(importlib.import_module(module), owner)
    original: Callable[..., Any] = getattr(target, name)
    count = 0

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        result = original(self, *arguments, **keywords)
        count += 1
        if count == calls:
            for stream in getattr(self, "_files", {}).values():
                # Rows after the last commit may be on disk, too.
                stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(target, name, counted)


def tear(path: Path) -> None:
    """Cut the last line of a file in half, as a kill during a write would."""
    content = path.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(content[: (start + len(content)) // 2])


# --------------------------------------------------------------------------------------------------
# Content
# --------------------------------------------------------------------------------------------------


def make(tree: Path, folder: Path) -> None:
    """Fill a folder with the content of the archive."""
    before, after = folder / "before", folder / "after"
    before.mkdir()
    code, _, stderr = in_child(lambda: make_inputs(before))
    if code:
        raise SystemExit(stderr)
    for name in ("convert", "preprocess"):
        run(tree, COMMANDS[name], before)
    held_out = [*PREPROCESS, "--input", "held_out.jsonl", "--tokenizer", "model", "--output-prefix", "held_out"]
    run(tree, held_out, before)
    shutil.copytree(before, after)
    for name in ("train", "train, rmsprop", "reference", "export", "generate", "evaluate", "evaluate, short"):
        run(tree, COMMANDS[name], after)

    # The writer commits every 64 rows.
    kill(tree, COMMANDS["preprocess, killed"], before, "sample", 74)
    kill(tree, COMMANDS["train"], before, "step", 5)
    tear(before / "run" / "metrics.jsonl")
    run(tree, [*COMMANDS["train, rmsprop"], "--exit-interval", "1"], before)
    kill(tree, COMMANDS["reference"], before, "reference", 3)
    # In the last stage, with a whole line of only one of two documents that are answered together.
    pairs = DOCUMENTS // 2
    kill(tree, COMMANDS["generate"], before, "stage", DOCUMENTS + 2 * pairs + 2)
    tear(before / "generated.jsonl.work" / "part-00-of-01" / "long.jsonl")
    suites = COMMANDS["evaluate"].index("--tasks") + 1
    of_suite = {
        s: [*COMMANDS["evaluate"][:suites], s, *COMMANDS["evaluate"][suites + 1 :]] for s in ("needle", "preference")
    }
    run(tree, of_suite["needle"], before)
    kill(tree, of_suite["preference"], before, "answers", 3)
    kill(tree, COMMANDS["evaluate"], before, "answers", 1)
    kill(tree, COMMANDS["evaluate, short"], before, "answers", 1)
    for suite in ("ruler", "preference"):
        tear(before / "evaluation" / suite / "parts" / "0-of-1" / "answers.jsonl")

    for name in list_files(after):
        if not any(name == kept or name.startswith(kept + "/") for kept in AFTER):
            (after / name).unlink()
    for path in sorted(after.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    (folder / "commands.json").write_text(json.dumps(COMMANDS, indent=2) + "\n", encoding="utf-8")
    (folder / "flags.json").write_text(json.dumps(flags_of_all(tree, folder), indent=2) + "\n", encoding="utf-8")
    make_settings(tree, folder / "settings")
    for name in list_files(folder):
        if str(folder).encode() in (folder / name).read_bytes():
            raise SystemExit(
                f"error: {name} holds the path of this folder; the files must not depend on where they were made"
            )


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def make_inputs(folder: Path) -> None:
    """Write a tiny chat model, texts, and pairs, some of them unusable."""
    make_model(folder / "model")
    rng = random.Random(0)

    def sentences(count: int) -> str:
        found = [" ".join(rng.choices(WORDS, k=rng.randint(5, 12))).capitalize() + "." for _ in range(count)]
        return " ".join(found)

    (folder / "texts").mkdir()
    for number in range(DOCUMENTS):
        # The last one is too short.
        text = "\n\n".join(sentences(5) for _ in range(6 if number < DOCUMENTS - 1 else 1))
        (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "generation.yaml").write_text(GENERATION, encoding="utf-8")

    def row(number: int) -> dict[str, Any]:
        chunks = [sentences(2) for _ in range(3)]
        turns = [
            {
                "instruction": f"What is said of number {number}?",
                "short_context": chunks[turn],
                "chosen": sentences(1),
                "rejected": sentences(1),
            }
            for turn in range(1 + number % 2)
        ]
        return {"id": str(number), "context": " ".join(chunks), "turns": turns}

    rows = [row(number) for number in range(90)]
    for name, part in (("pairs", rows[:84]), ("held_out", rows[84:])):
        lines = [json.dumps(r) for r in part]
        if name == "pairs":
            # Not JSON, no context, and a turn whose chunk is not in the document.
            lines[5] = lines[5][:40]
            lines[17] = json.dumps({**part[17], "context": ""})
            part[31]["turns"][1]["short_context"] = "Nowhere to be found."
            lines[31] = json.dumps(part[31])
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    make_questions(folder, sentences)


def make_questions(folder: Path, sentences: Callable[[int], str]) -> None:
    """Questions of the evaluation suites, in the formats of their data sets."""
    texts = [sentences(3) for _ in range(30)]

    def write(path: str, rows: list[dict[str, Any]], bad: str = "") -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(bad + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    squad = [
        {"title": f"t{i}", "context": text, "question": f"What of {i}?", "answers": {"text": [f"a{i}"]}}
        for i, text in enumerate(texts)
    ]
    write("squad.jsonl", squad)
    hotpot = [
        {
            "question": f"Who of {i}?",
            "answer": f"n{i}",
            "supporting_facts": [[f"t{i}", 0]],
            "context": [[f"t{j}", [texts[j]]] for j in range(i, i + 3)],
        }
        for i in range(10)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot), encoding="utf-8")
    books = [{"id": i, "context": sentences(150), "input": "Who climbs?", "answer": ["people"]} for i in range(2)]
    write("books/longbook_qa_eng.jsonl", books, bad="{broken\n")

    def choices(i: int) -> dict[str, Any]:
        answers = {"text": [f"{WORDS[i % 9]} {j}" for j in range(4)], "label": list("ABCD")}
        return {"id": str(i), "question": f"What of {i}?", "choices": answers, "answerKey": "ABCD"[i % 4]}

    # The harness shows 25 examples before each question.
    write("local/arc_challenge/train.jsonl", [choices(i) for i in range(30)])
    write("local/arc_challenge/test.jsonl", [choices(i) for i in range(30, 38)])


def make_model(folder: Path) -> None:
    """A tiny Llama with random weights and a byte-level BPE tokenizer with ChatML's template."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Large, so that the likeliest token is far ahead of the next and rounding cannot change it.
                parameter.normal_(0, 0.25)
    model.save_pretrained(folder)


def make_settings(tree: Path, folder: Path) -> None:
    """Write each configuration as YAML files and flags, and what that commit resolves them to."""
    folder.mkdir()
    (folder / "examples").mkdir()
    for name, program in EXAMPLES.items():
        shutil.copyfile(tree / "examples" / name, folder / "examples" / name)
        resolved = run(tree, [*CONFIGURED[program], "--config", f"examples/{name}", "--print-config"], folder)
        (folder / "examples" / f"{name}.resolved").write_text(resolved, encoding="utf-8")
    (folder / "examples.json").write_text(json.dumps(EXAMPLES, indent=2) + "\n", encoding="utf-8")
    flags: dict[str, list[str]] = {}
    for program, text in SETTINGS.items():
        (folder / f"{program}.yaml").write_text(text, encoding="utf-8")
        defaults = run(tree, [*CONFIGURED[program], "--print-config"], folder)
        (folder / f"{program}.defaults").write_text(defaults, encoding="utf-8")
        values, known = yaml.safe_load(text), yaml.safe_load(defaults)
        assert {s: set(keys) for s, keys in values.items()} == {s: set(keys) for s, keys in known.items()}, program
        flags[program] = [
            flag for section in values.values() for key, value in section.items() for flag in flag_of(key, value)
        ]
        for form in (["--config", f"{program}.yaml"], flags[program]):
            resolved = run(tree, [*CONFIGURED[program], *form, "--print-config"], folder)
            assert yaml.safe_load(resolved) == values, program
        check(program, folder / f"{program}.yaml")
    (folder / "flags.json").write_text(json.dumps(flags, indent=2) + "\n", encoding="utf-8")


def flag_of(key: str, value: Any) -> list[str]:
    """The flag that sets a key."""
    flag = "--" + key.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def check(program: str, path: Path) -> None:
    """Check the values of a file by the rules of that commit; raises its ConfigError."""
    from megatron_longpo import config
    from megatron_longpo.evaluation import settings as evaluation
    from megatron_longpo.generation import settings as generation

    if program == "train":
        config.check(config.from_yaml(path))
    elif program == "generate":
        generation.check(config.from_yaml(path, generation.GenerationConfig))
    else:
        evaluation.check(config.from_yaml(path, evaluation.EvaluationConfig))


def flags_of_all(tree: Path, folder: Path) -> dict[str, list[str]]:
    """Every flag of every command line, by its command."""
    commands = [TRAIN, GENERATE, EVALUATE, PREPROCESS, *([*CONVERT, c] for c in ("import", "export", "verify"))]
    commands += [[f"tools/{path.name}"] for path in sorted((tree / "tools").glob("benchmark_*.py"))]
    commands += [["examples/demo.py"], ["examples/evaluation_data.py"]]
    found = {}
    for command in commands:
        text = run(tree, [*command, "--help"], folder)
        # Flags stand at the beginning of a line, in a box (tyro) or not (argparse), separated by commas.
        lines = re.findall(r"^[ │|]*(--?[a-z][^ ]*.*)$", text, re.MULTILINE)
        flags = [
            flag for line in lines for flag in re.findall(r"(?<!\S)--[a-z0-9][a-z0-9-]*", re.split(r"\s{2,}", line)[0])
        ]
        found[" ".join(command)] = sorted(set(flags) - {"--help"})
    for program, command in CONFIGURED.items():
        keys = {key for section in yaml.safe_load(SETTINGS[program]).values() for key in section}
        assert {"--" + key.replace("_", "-") for key in keys} <= set(found[" ".join(command)]), program
    return found


def pack(folder: Path, output: Path) -> None:
    """Write the archive; the same files give the same bytes."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if info.name.endswith(".png"):
            return None
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name, filter=plain)
    output.write_bytes(gzip.compress(content.getvalue(), 9, mtime=0))


if __name__ == "__main__":
    main()
