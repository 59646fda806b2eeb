"""Command lines: every form that release 0.1.0 took is still taken, and means the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo import cli
from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation import compare
from tests.support.commands import parsed
from tests.support.launch import ROOT

CONVERT_CHANGES = {
    "--rotary-base": ("1e7", 1e7),
    "--rope-type": ("yarn", "yarn"),
    "--rotary-scaling-factor": ("4", 4.0),
    "--attention-factor": ("1.1", 1.1),
    "--beta-fast": ("32", 32.0),
    "--beta-slow": ("1", 1.0),
    "--low-freq-factor": ("1", 1.0),
    "--high-freq-factor": ("4", 4.0),
    "--original-max-position-embeddings": ("4096", 4096),
    "--max-position-embeddings": ("16384", 16384),
}
CONVERT_COMPARISON = {
    "--text": ("README.md", "README.md"),
    "--tokens": ("512", 512),
    "--rows": ("2", 2),
    "--seed": ("3", 3),
    "--first-position": ("1000", 1000),
    "--bound": ("1e-3", 1e-3),
    "--report": ("r.json", "r.json"),
}


def values_of(options: Any) -> dict[str, Any]:
    """Values of a dataclass and of the dataclasses in it, by field."""
    found = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        found.update(values_of(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return found


def flags_of(table: dict[str, tuple[str, Any]]) -> list[str]:
    return [part for flag, (text, _) in table.items() for part in (flag, text)]


def expected_of(table: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    return {flag[2:].replace("-", "_"): value for flag, (_, value) in table.items()}


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (
            "convert",
            ["import", "--hf", "h", "--output", "o", "--dtype", "bfloat16", "--name", "n", *flags_of(CONVERT_CHANGES)],
            {"hf": "h", "output": "o", "dtype": "bfloat16", "name": "n", **expected_of(CONVERT_CHANGES)},
        ),
        ("convert", ["import", "--hf=h", "--output=o"], {"hf": "h", "dtype": None, "rotary_base": None}),
        (
            "convert",
            ["export", "--checkpoint", "c", "--output", "o", "--dtype", "float16", *flags_of(CONVERT_CHANGES)],
            {"checkpoint": "c", "dtype": "float16", "max_shard_size": 5 * 10**9, **expected_of(CONVERT_CHANGES)},
        ),
        (
            "convert",
            ["export", "--checkpoint", "c", "--output", "o", *flags_of(CONVERT_COMPARISON), "--whole"],
            {"verify": True, "logits": True, "whole": True, **expected_of(CONVERT_COMPARISON)},
        ),
        ("convert", ["export", "--checkpoint", "c", "--output", "o", "--no-verify"], {"verify": False}),
        ("convert", ["export", "--checkpoint", "c", "--output", "o", "--no-logits"], {"logits": False}),
        *(
            (
                "convert",
                ["export", "--checkpoint", "c", "--output", "o", "--max-shard-size", text],
                {"max_shard_size": size},
            )
            for text, size in [("2GB", 2 * 10**9), ("500mb", 500 * 10**6), ("3", 3 * 10**9), ("123456", 123456)]
        ),
        (
            "convert",
            ["verify", "--checkpoint", "c", "--hf", "h", *flags_of(CONVERT_CHANGES), *flags_of(CONVERT_COMPARISON)],
            {"checkpoint": "c", "hf": "h", **expected_of(CONVERT_CHANGES), **expected_of(CONVERT_COMPARISON)},
        ),
        (
            "preprocess",
            ["--input", "a", "b", "--output-prefix", "p", "--tokenizer", "t", "--chat-template", "chatml"],
            {"input": ("a", "b"), "output_prefix": "p", "tokenizer": "t", "chat_template": "chatml", "restart": False},
        ),
        (
            "preprocess",
            [
                *("--input", "a", "--output-prefix", "p", "--vocab-size", "101", "--seq-length", "1024"),
                *("--short-seq-length", "512", "--workers", "3", "--restart", "--trust-remote-code"),
            ],
            {
                "vocab_size": 101,
                "seq_length": 1024,
                "short_seq_length": 512,
                "workers": 3,
                "restart": True,
                "trust_remote_code": True,
            },
        ),
        ("preprocess", ["--input", "a", "--output_prefix", "p", "--seq_length", "8"], {"seq_length": 8}),
        ("generate", ["merge", "--output", "o"], {"output": "o"}),
        ("evaluate", ["compare", "a", "b", "--seed", "3"], {"folders": ("a", "b"), "output": "comparison", "seed": 3}),
    ],
)
def test_old_forms_of_flags_are_taken(command: str, arguments: list[str], expected: dict[str, Any]) -> None:
    found = values_of(parsed(command, arguments))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("command", "arguments", "section", "expected"),
    [
        ("train", ["--lr", "1e-6", "--sequence-parallel"], "optimizer", {"lr": 1e-6}),
        ("train", ["--sequence-parallel", "--no-shuffle"], "parallel", {"sequence_parallel": True}),
        ("train", ["--no-shuffle", "--tensorboard"], "data", {"shuffle": False}),
        ("train", ["--recompute-modules", "mlp", "mlp_up"], "training", {"recompute_modules": ("mlp", "mlp_up")}),
        ("train", ["--objective", "dpo", "--beta=0.05"], "objective", {"objective": "dpo", "beta": 0.05}),
        (
            "train",
            ["--train-iters", "None", "--train_epochs", "2"],
            "training",
            {"train_iters": None, "train_epochs": 2.0},
        ),
        ("generate", ["--documents", "a", "b/*", "--model", "m"], "documents", {"documents": ("a", "b/*")}),
        ("generate", ["--refusals", "--rank", "1", "--world-size", "2"], "filters", {"refusals": ()}),
        ("generate", ["--engine", "openai", "--base-url", "http://h/v1"], "engine", {"engine": "openai"}),
        (
            "evaluate",
            ["--tasks", "ruler,needle", "--lengths", "4K", "8192", "--restart", "--samples", "3"],
            "evaluate",
            {"tasks": ("ruler,needle",), "lengths": ("4K", "8192"), "samples": 3},
        ),
        ("evaluate", ["--tasks", "needle", "--needle-haystack", "single"], "needle", {"needle_haystack": "single"}),
        ("evaluate", ["--haystack", "a", "b", "--words", "w"], "ruler", {"haystack": ("a", "b"), "words": "w"}),
    ],
)
def test_every_field_is_a_flag(command: str, arguments: list[str], section: str, expected: dict[str, Any]) -> None:
    _, config = parsed(command, arguments)
    found = vars(getattr(config, section))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_a_file_is_below_the_flags_wherever_it_stands(command: str, form: list[str], tmp_path: Path) -> None:
    section = {"train": "training", "generate": "run", "evaluate": "evaluate"}[command]
    path = tmp_path / "c.yaml"
    path.write_text(f"{section}: {{seed: 5}}\n")
    file = [part.format(path) for part in form]
    for arguments, seed in [
        (file, 5),
        ([*file, "--seed", "6"], 6),
        (["--seed", "6", *file], 6),
        (["--print-config", *file], 5),
    ]:
        options, config = parsed(command, arguments)
        assert getattr(config, section).seed == seed
        assert options.print_config == ("--print-config" in arguments)


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_restart_is_a_switch_that_may_stand_anywhere(command: str) -> None:
    for arguments in (["--output", "o", "--restart", "--seed", "1"], ["--restart", "--output", "o"]):
        options, _ = parsed(command, arguments)
        assert options.restart
    assert not parsed(command, [])[0].restart


def test_compare_is_a_flag_of_evaluate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[object, ...]] = []
    monkeypatch.setattr(compare, "write_comparison", lambda *arguments: compared.append(arguments))
    for arguments in (
        ["--compare", "a", "b", "--output", "o", "--seed", "5"],
        ["--output=o", "--seed=5", "--compare", "a", "b"],
        ["--output", "o", "--compare", "a", "b", "--seed", "5"],
        ["compare", "a", "b", "--output", "o", "--seed", "5"],
    ):
        name, prog, rest = cli.resolve("evaluate", "p", arguments)
        cli.function_of(name)(rest, prog=prog)
    assert compared == [([Path("a"), Path("b")], Path("o"), 5)] * 4
    cli.function_of("evaluate")(["--compare", "a", "b", "c"], prog="p")
    assert compared[-1] == ([Path("a"), Path("b"), Path("c")], Path("comparison"), 1234)
    with pytest.raises(ConfigError, match="at least two"):
        monkeypatch.undo()
        cli.function_of("evaluate")(["--compare"], prog="p")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("", []),
        ("", ["trian"]),
        ("convert", []),
        ("convert", ["import", "--hf", "h"]),
        ("convert", ["export", "--checkpoint", "c", "--output", "o", "--max-shard-size", "big"]),
        ("convert", ["import", "--hf", "h", "--output", "o", "--dtype", "int8"]),
        ("preprocess", ["--input", "a"]),
        ("train", ["--learning-rate", "1"]),
        ("train", ["--objective", "ppo"]),
        ("train", ["--config"]),
        ("generate", ["merge"]),
        ("generate", ["merge", "--output", "o", "--seed", "1"]),
    ],
)
def test_unreadable_command_lines_end_with_status_2(command: str, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        parsed(command, arguments)
    assert ending.value.code == 2


@pytest.mark.parametrize("words", [*cli.COMMANDS, *cli.GROUPS, ""])
def test_every_command_has_help(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        parsed("", [*words.split(), "--help"])
    assert not ending.value.code
    assert f"usage: program {words}".strip() in capsys.readouterr().out


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        parsed("train", ["--config", "nowhere.yaml"])
    with pytest.raises(ConfigError, match="input is empty"):
        cli.function_of("preprocess")(["--input", "--output-prefix", "p"], prog="p")


PROGRAMS = {
    "megatron_longpo.cli": ["-m", "megatron_longpo.cli"],
    "megatron_longpo.train": ["-m", "megatron_longpo.train"],
    "megatron_longpo.doctor": ["-m", "megatron_longpo.doctor"],
    **{
        tool: [f"tools/{tool}.py"]
        for tool in ("convert_checkpoint", "evaluate", "generate_preference_data", "preprocess_preference_data")
    },
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_print_their_help_without_importing_torch(program: str) -> None:
    line = [sys.executable, "-X", "importtime", *PROGRAMS[program], "--help"]
    done = subprocess.run(line, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "tyro" in imported
    assert not imported & {"torch", "transformers", "megatron.core"}


def test_errors_of_the_user_end_with_status_2() -> None:
    line = [sys.executable, "-m", "megatron_longpo.train", "--config", "nowhere.yaml"]
    done = subprocess.run(line, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: --config nowhere.yaml: there is no such file")
