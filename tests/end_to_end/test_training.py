"""The real command lines: from rows and text to an exported model, killed and resumed, failing as they should."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_longpo.checkpoint.folders import folder_of, latest_step
from megatron_longpo.checkpoint.huggingface import HuggingFaceWeights
from megatron_longpo.text.chat import BUILT_IN_TEMPLATES
from megatron_longpo.training.metrics import SAMPLE_METRICS, read_metrics
from tests.support.data import make_data, text_row, tokenised_row, write_lines
from tests.support.launch import PYTHON, Running, command, environment, run, torchrun
from tests.support.models import make_model
from tests.support.runs import TIMED, assert_same_tensors, metrics_of
from tests.support.tokenizers import make_fast_tokenizer, make_sentencepiece


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and, beside it, its checkpoint and data."""
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", folder / "hf", max_position_embeddings=512)
    run(command("convert", "import", hf=folder / "hf", output=folder / "ckpt"), fresh=True)
    make_data(folder / "data", 12)
    return folder


def train(model: Path, output: Path, *flags: str, data: Path | None = None) -> list[str]:
    """Arguments of a short training run."""
    return [
        *("-m", "megatron_longpo.train", "--data-path", str(data or model / "data"), "--load", str(model / "ckpt")),
        *("--save", str(output), "--global-batch-size", "4", "--lr", "1e-3", "--adam-eps", "1e-4"),
        *("--no-tensorboard", "--preference-weight", "0.5", "--plot-interval", "1000", *flags),
    ]


@pytest.mark.megatron_latest
def test_tokenised_rows_to_a_trained_hugging_face_model(model: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [json.dumps(tokenised_row()) for _ in range(8)])
    prefix = tmp_path / "data"
    made = command("preprocess", input=tmp_path / "rows.jsonl", output_prefix=prefix, vocab_size=101)
    run([*made, "--keep-duplicates"], fresh=True)
    config = tmp_path / "c.yaml"
    config.write_text("objective:\n  beta: 0.05\ntraining:\n  train_iters: 2\n")
    output = tmp_path / "run"
    flags = ["--config", str(config), "--rotary-base", "40000", "--seq-length", "1024"]
    run([PYTHON, *train(model, output, *flags, data=prefix)], fresh=True)
    records = read_metrics(output / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2]
    # A process by itself has no peers to be slower than, and nothing was computed twice.
    timed = {name for name in TIMED if not name.startswith("straggler/")} - {"seconds/rerun"}
    expected = {*SAMPLE_METRICS, "step", "grad_norm", "lr", *timed}
    assert all(set(r) == expected for r in records)
    assert (output / "curves.png").stat().st_size > 1000
    assert "beta: 0.05" in (output / "run.yaml").read_text()
    assert (output / "latest_checkpointed_iteration.txt").read_text() == "2\n"

    run(command("convert", "export", checkpoint=output, output=tmp_path / "hf"), fresh=True)
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert trained.config.rope_parameters["rope_theta"] == 40000
    assert trained.config.max_position_embeddings == 1024
    before = HuggingFaceWeights(model / "hf").read("model.embed_tokens.weight")
    assert not torch.equal(trained.model.embed_tokens.weight, before)


def test_text_to_a_training_run(tmp_path: Path) -> None:
    """Text with a chat template, tokenizer checked against the model's; the wrong tokenizer refused."""
    hf = make_model("qwen2", tmp_path / "hf", vocab_size=400)
    make_fast_tokenizer(hf)
    write_lines(tmp_path / "pairs.jsonl", [json.dumps(text_row(i, turns=1 + i % 2)) for i in range(8)])
    run([PYTHON, "tools/convert_checkpoint.py", "import", "--hf", str(hf), "--output", str(tmp_path / "ckpt")])
    tool = [PYTHON, "tools/preprocess_preference_data.py", "--input", str(tmp_path / "pairs.jsonl"), "--output-prefix"]
    run([*tool, str(tmp_path / "data"), "--tokenizer", str(hf), "--workers", "2"])
    assert (tmp_path / "data.lengths.png").stat().st_size > 1000
    flags = ["--turns", "independent", "--train-iters", "1", "--bf16", "--recompute-granularity", "full"]
    flags += ["--deterministic-mode", "--log-format", "json"]
    done = run([PYTHON, *train(tmp_path, tmp_path / "run", *flags)])
    assert len(metrics_of(tmp_path / "run")) == 1
    logged = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in logged if line.get("event") == "step"] == [1]

    other = make_sentencepiece(tmp_path / "other")
    run([*tool, str(tmp_path / "wrong"), "--tokenizer", str(other), "--chat-template", "mistral"])
    done = run([PYTHON, *train(tmp_path, tmp_path / "no", data=tmp_path / "wrong")], expect=2)
    assert "is not the model's" in done.stderr and "Traceback" not in done.stderr
    assert "mistral" in BUILT_IN_TEMPLATES


@pytest.mark.parametrize("asynchronous", [False, True], ids=["save", "async-save"])
def test_killed_at_random_moments_and_resumed(model: Path, tmp_path: Path, asynchronous: bool) -> None:
    """Five times SIGKILL for all processes, while saving as well (every step saves): the undisturbed run's numbers.

    The first launch and the last are a user's: fresh interpreters.
    """
    layout = ["--use-distributed-optimizer", "--train-iters", "10", "--save-interval", "1", "--keep-last", "2"]
    # The fingerprints are among the metrics that are compared.
    layout += ["--fingerprint-interval", "1", *(["--async-save"] if asynchronous else [])]
    run(torchrun(2, *train(model, tmp_path / "whole", *layout)))
    output = tmp_path / "broken"
    seed = int(time.time())
    rng = random.Random(seed)
    kills = 0
    while kills < 5:
        process = Running(torchrun(2, *train(model, output, *layout)), fresh=kills == 0 and not asynchronous)
        target = len(metrics_of(output)) + rng.randint(0, 2)
        deadline = time.monotonic() + 120
        while process.poll() is None and len(metrics_of(output)) < min(target, 10) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.6)
        if process.poll() is not None:
            break
        process.kill()
        kills += 1
    run(torchrun(2, *train(model, output, *layout)), fresh=not asynchronous)
    assert metrics_of(output) == metrics_of(tmp_path / "whole"), f"seed {seed}"
    assert [r["step"] for r in metrics_of(output)] == list(range(1, 11))
    assert_same_tensors(folder_of(output, 10), folder_of(tmp_path / "whole", 10))
    assert latest_step(output) == 10
    assert not list(output.glob(".writing_*")) or kills
    assert len(list(output.glob("iter_*"))) <= 2


def test_resumed_at_another_layout(model: Path, tmp_path: Path) -> None:
    """Steps on TP2 with sequence parallelism, on PP2 with 3 and 1 layers, on CP2, and on PP2 with equal virtual stages;
    against one process."""
    common = ["--train-iters", "6", "--lr-decay-style", "linear", "--lr-warmup-iters", "2"]
    run([PYTHON, *train(model, tmp_path / "one", *common)])
    output = tmp_path / "several"
    for step, flags in (
        (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
        (3, ["--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "3"]),
        (4, ["--context-parallel-size", "2", "--cp-comm-type", "allgather"]),
        (6, ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]),
    ):
        run(torchrun(2, *train(model, output, *common, *flags, "--exit-interval", str(step))))
        assert latest_step(output) == step
    assert_same_tensors(folder_of(output, 6), folder_of(tmp_path / "one", 6), 1e-5)
    for found, expected in zip(metrics_of(output), metrics_of(tmp_path / "one"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["lr"] == expected["lr"]


def test_distributed_optimizer_resumes_at_another_layout(model: Path, tmp_path: Path) -> None:
    common = ["--train-iters", "4", "--use-distributed-optimizer"]
    run([PYTHON, *train(model, tmp_path / "one", *common)])
    output = tmp_path / "several"
    # Where its states are, on the device or in host memory, is no part of a checkpoint.
    offloaded = "--optimizer-cpu-offload"
    run(torchrun(2, *train(model, output, *common, offloaded, "--exit-interval", "2")))
    # Each of the two ranks wrote its half of weights and states.
    sizes = [path.stat().st_size for path in sorted(folder_of(output, 2).glob("__*.distcp"))]
    assert len(sizes) == 2 and max(sizes) < 1.2 * min(sizes)
    common += ["--tensor-model-parallel-size", "2"]
    run(torchrun(2, *train(model, output, *common, offloaded, "--exit-interval", "3")))
    run(torchrun(2, *train(model, output, *common)))
    assert_same_tensors(folder_of(output, 4), folder_of(tmp_path / "one", 4), 1e-5)


def test_reference_cache_goes_on_and_is_used_again(model: Path, tmp_path: Path) -> None:
    flags = ["--train-iters", "1", "--reference-cache", str(tmp_path / "cache")]
    first = run([PYTHON, *train(model, tmp_path / "a", *flags)])
    assert "scoring 12 samples once" in first.stdout
    second = run([PYTHON, *train(model, tmp_path / "b", *flags)])
    assert "found in" in second.stdout and "scoring" not in second.stdout
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    # Half of it lost: only that is scored again.
    table = next((tmp_path / "cache").glob("*.npy"))
    import numpy as np

    values = np.load(table)
    half = values.copy()
    half[6:] = np.nan
    half.tofile(table.with_suffix(".partial"))
    table.unlink()
    third = run([PYTHON, *train(model, tmp_path / "c", *flags)])
    assert "6 of 12 samples were scored before" in third.stdout
    np.testing.assert_allclose(np.load(table), values, rtol=1e-6)
    table.write_bytes(b"junk")
    done = run([PYTHON, *train(model, tmp_path / "d", *flags)], expect=2)
    assert str(table) in done.stderr and "remove it" in done.stderr


def test_two_data_sets_with_weights(model: Path, tmp_path: Path) -> None:
    """Drawn in proportion and counted; resumed in the middle; each with a reference cache of its own."""
    make_data(tmp_path / "more", 5, seed=3)
    # The flag that comes last counts.
    flags = ["--data-path", "0.75", str(model / "data"), "0.25", str(tmp_path / "more"), "--train-iters", "4"]
    run([PYTHON, *train(model, tmp_path / "one", *flags)])
    run([PYTHON, *train(model, tmp_path / "two", *flags, "--exit-interval", "2")])
    done = run([PYTHON, *train(model, tmp_path / "two", *flags)])
    assert metrics_of(tmp_path / "two") == metrics_of(tmp_path / "one")
    assert [(r["samples/data"], r["samples/more"]) for r in metrics_of(tmp_path / "two")] == [(3, 1)] * 4
    assert f"data: 75.0% from {model / 'data'}, 12 samples, each used 1 times" in done.stdout
    caches = [list(Path(f"{prefix}.reference").glob("*.npy")) for prefix in (model / "data", tmp_path / "more")]
    assert [len(files) for files in caches] == [1, 1]
    flags[1] = "0.5"
    refused = run([PYTHON, *train(model, tmp_path / "two", *flags)], expect=2)
    assert "has data_weights=[0.75, 0.25], but now it is [0.5, 0.25]" in refused.stderr


def test_a_profile_names_the_phases_of_its_steps(model: Path, tmp_path: Path) -> None:
    """Steps 2 and 3 of 4 on rank 1 only; and a profile that the last step cuts short."""
    output = tmp_path / "run"
    flags = ["--profile", "--profile-step-start", "1", "--profile-step-end", "3", "--profile-ranks", "1"]
    run(torchrun(2, *train(model, output, "--train-iters", "4", "--save-interval", "2", *flags)))
    (trace,) = (output / "profile").iterdir()
    assert trace.name == "steps_2-3_rank_1.json.gz"
    phases = phases_of(trace)
    names = ("reference", "forward_backward", "optimizer", "save")
    assert {name: len(phases[name]) for name in names} == dict.fromkeys(names, 2)
    for forward_backward, optimizer in zip(phases["forward_backward"], phases["optimizer"], strict=True):
        assert forward_backward["ts"] + forward_backward["dur"] <= optimizer["ts"]

    flags = ["--profile", "--profile-step-start", "4", "--profile-step-end", "100"]
    run([PYTHON, *train(model, output, "--train-iters", "6", "--lr-decay-style", "constant", *flags)])
    assert len(phases_of(output / "profile" / "steps_5-6_rank_0.json.gz")["optimizer"]) == 2


def phases_of(trace: Path) -> dict[str, list[dict[str, Any]]]:
    """Events of the trainer's phases in a chrome trace, in order of time."""
    phases: dict[str, list[dict[str, Any]]] = {}
    for event in sorted(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"], key=lambda e: e.get("ts", 0)):
        if (
            event.get("name", "").startswith("longpo/")
            and event.get("ph") == "X"
            and event.get("cat") == "user_annotation"
        ):
            phases.setdefault(event["name"].removeprefix("longpo/"), []).append(event)
    return phases


def _errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tensor-model-parallel-size", "3"], "do not divide the world"),
        (["--global-batch-size", "3"], "global_batch_size=3"),
        (["--data-path", "/nowhere/data"], "there is no such file"),
        (["--load", "/nowhere"], "there is no such folder"),
        (["--seq-length", "10"], "seq_length=10"),
    ],
)
def test_wrong_settings_end_all_ranks_with_one_message(
    model: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    done = run(torchrun(2, *train(model, tmp_path / "run", *flags)), expect=None, timeout=60)
    assert done.returncode != 0
    errors = _errors(done.stderr)
    assert len(errors) == 1 and message in errors[0]


def test_a_port_in_use_is_named(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", WORLD_SIZE="1")
        done = run([PYTHON, *train(model, tmp_path / "run")], env=env, expect=2)
    assert f"error: MASTER_PORT={port} is in use by another program; choose a free one" in done.stderr


def test_damaged_data_ends_all_ranks_with_one_message(model: Path, tmp_path: Path) -> None:
    """What only the first rank checks."""
    for suffix in ("bin", "idx", "json"):
        shutil.copyfile(f"{model / 'data'}.{suffix}", tmp_path / f"data.{suffix}")
    content = bytearray((tmp_path / "data.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "data.bin").write_bytes(content)
    done = run(torchrun(2, *train(model, tmp_path / "run", data=tmp_path / "data")), expect=None, timeout=60)
    errors = _errors(done.stderr)
    assert done.returncode != 0 and len(errors) == 1 and "data.bin" in errors[0]


def test_an_exception_of_one_rank_ends_all(model: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    arguments = ["-m", "tests.support.failing_rank", *train(model, tmp_path / "run", "--train-iters", "50")[2:]]
    done = run(torchrun(2, *arguments), expect=None, timeout=90)
    assert done.returncode != 0
    (line,) = _errors(done.stderr)
    cause, traceback = line.removesuffix(")").split(" (traceback: ")
    assert cause == "error: rank 1 failed: RuntimeError: the disk of rank 1 is on fire"
    assert "in _step" in Path(traceback).read_text()
    assert time.monotonic() - began < 60


def test_a_killed_rank_ends_all(model: Path, tmp_path: Path) -> None:
    process = Running(torchrun(2, *train(model, tmp_path / "run", "--train-iters", "100000")), fresh=True)
    while len(metrics_of(tmp_path / "run")) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    worker = psutil.Process(process.pid).children()[-1]
    began = time.monotonic()
    os.kill(worker.pid, signal.SIGKILL)
    done = process.wait(timeout=60, expect=None)
    output = done.stdout + done.stderr
    assert time.monotonic() - began < 30
    assert done.returncode != 0
    assert output.count("Signal 9 (SIGKILL)") == 1
    assert len(_errors(output)) <= 1


def test_what_may_change_on_resume_and_what_may_not(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    constant = ["--lr-decay-style", "constant"]
    run([PYTHON, *train(model, output, "--train-iters", "2", *constant)])
    run([PYTHON, *train(model, output, "--train-iters", "3", *constant, "--lr", "1e-5")])
    assert [r["lr"] for r in metrics_of(output)] == [1e-3, 1e-3, 1e-5]
    for flags, name in (
        (["--global-batch-size", "2"], "global_batch_size=4"),
        (["--seed", "5"], "seed=1234"),
        (["--bf16"], "bf16=False"),
        (["--beta", "0.2"], "beta=0.1"),
        (["--label-smoothing", "0.1"], "label_smoothing=0.0"),
        (["--load", str(output)], "reference_weights="),
    ):
        done = run([PYTHON, *train(model, output, "--train-iters", "4", *flags)], expect=2)
        assert name in done.stderr and "--save" in done.stderr and "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run(model: Path, tmp_path: Path) -> None:
    flags = [
        "--train-iters",
        "3",
        "--lr",
        "1e30",
        "--lr-decay-style",
        "constant",
        "--clip-grad",
        "0",
        "--adam-eps",
        "1e-8",
    ]
    done = run([PYTHON, *train(model, tmp_path / "run", *flags)], expect=2)
    assert _errors(done.stderr)[0].startswith("error: step ") and "lower lr" in done.stderr
    assert latest_step(tmp_path / "run") is None


def test_a_damaged_checkpoint_is_named(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run([PYTHON, *train(model, output, "--train-iters", "1")])
    largest = max(folder_of(output, 1).glob("*.distcp"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    done = run([PYTHON, *train(model, output, "--train-iters", "2")], expect=2)
    assert str(folder_of(output, 1)) in done.stderr and "Traceback" not in done.stderr
