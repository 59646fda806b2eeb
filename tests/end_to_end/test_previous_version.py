"""Files, interrupted work, YAML files and flags of commit a8ab853 are still accepted.

``tests/compatibility/make_fixtures.py`` made the archive with the command lines of that commit. Each test copies its files and
reruns those commands, with relative paths: pair generation compares the path of the tokenizer as it was given, while everything
else is recognised by its content, so the folder may lie anywhere.

Numbers are compared to 1e-5. On the machine that made the archive they are equal bit for bit; another CPU may add in another
order. ``NOISE`` is what that leaves of a difference of two log-probs of some hundred nats, such as a reward or a KL estimate.
Text is compared exactly: the tiny model's likeliest tokens are far ahead of the next.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.support.launch import PROGRAMS, PYTHON, ROOT, run

ARCHIVE = ROOT / "tests" / "compatibility" / "a8ab853.tar.gz"
TIMED = ("tokens_per_second", "step_seconds", "peak_memory_gb", "seconds", "finished")
NOISE = 5e-5
CONFIGURED = ("train", "generate", "evaluate")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a8ab853")
    with tarfile.open(ARCHIVE) as stream:
        stream.extractall(folder, filter="data")
    return folder


@pytest.fixture
def before(archive: Path, tmp_path: Path) -> Path:
    """A copy of what was on disk when the commands were killed."""
    return Path(shutil.copytree(archive / "before", tmp_path / "before"))


@pytest.fixture
def after(archive: Path) -> Path:
    """Outputs of the same commands, uninterrupted."""
    return archive / "after"


def run_in(folder: Path, command: list[str], expect: int = 0) -> Any:
    """Run a command line in a folder."""
    script = str(ROOT / command[0]) if command[0].endswith(".py") else command[0]
    return run([PYTHON, script, *command[1:]], folder=folder, expect=expect)


def rerun(archive: Path, name: str, folder: Path) -> None:
    """Run one of the archive's commands again."""
    run_in(folder, json.loads((archive / "commands.json").read_text())[name])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def assert_close(found: Any, expected: Any) -> None:
    """Everything that is expected was found, apart from measured times; more may be there."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            if key == "lr":
                assert found[key] == value
            elif key not in TIMED:
                assert_close(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=NOISE)
    else:
        assert found == expected


def assert_same_settings(found: Any, expected: dict[str, dict[str, Any]]) -> None:
    """Every key of every section has its value; there may be more keys."""
    for section, values in expected.items():
        assert {key: found[section][key] for key in values} == values, section


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def test_an_interrupted_preprocessing_resumes(archive: Path, before: Path) -> None:
    # A changed byte in the committed part shows that this part is kept.
    committed = before / "killed.partial" / "bin"
    content = bytearray(committed.read_bytes())
    content[0] ^= 1
    committed.write_bytes(content)
    rerun(archive, "preprocess, killed", before)
    expected = bytearray((before / "data.bin").read_bytes())
    expected[0] ^= 1
    assert (before / "killed.bin").read_bytes() == expected
    for suffix in ("idx", "rejects.jsonl"):
        assert (before / f"killed.{suffix}").read_bytes() == (before / f"data.{suffix}").read_bytes()
    found, whole = (json.loads((before / f"{name}.json").read_text()) for name in ("killed", "data"))
    assert {key for key in whole if found[key] != whole[key]} == {"bin_sha256", "manifest_sha256"}
    assert not (before / "killed.partial").exists()


def test_finished_data_is_kept(archive: Path, before: Path) -> None:
    files = [before / f"data.{suffix}" for suffix in ("bin", "idx", "json", "rejects.jsonl")]
    written = [path.stat().st_mtime_ns for path in files]
    assert len(rows(files[-1])) == 3
    rerun(archive, "preprocess", before)
    assert [path.stat().st_mtime_ns for path in files] == written


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def test_an_interrupted_run_resumes(archive: Path, before: Path, after: Path) -> None:
    """With the old data, reference cache and checkpoint; then the result is exported."""
    done = whole_lines(before / "run" / "metrics.jsonl").splitlines()
    assert len(done) == 4, "steps 1 to 3, and one after the last checkpoint"
    (cache,) = (before / "data.reference").glob("*.npy")
    scored = cache.stat().st_mtime_ns
    rerun(archive, "train", before)
    assert (before / "run" / "metrics.jsonl").read_bytes().splitlines()[:3] == done[:3]
    for name in ("metrics", "validation"):
        assert_close(rows(before / "run" / f"{name}.jsonl"), rows(after / "run" / f"{name}.jsonl"))
    assert [path.name for path in (before / "data.reference").glob("*.npy")] == [cache.name]
    assert cache.stat().st_mtime_ns == scored, "the reference was not scored again"
    rerun(archive, "export", before)
    found, expected = (load_file(folder / "trained" / "model.safetensors") for folder in (before, after))
    initial = load_file(before / "model" / "model.safetensors")
    assert found.keys() == expected.keys() == initial.keys()
    for name, value in expected.items():
        assert np.linalg.norm(found[name] - value) <= 1e-5 * np.linalg.norm(value), name
        assert np.linalg.norm(found[name] - initial[name]) > 1e-4 * np.linalg.norm(value), name


def test_a_stopped_run_resumes(archive: Path, before: Path, after: Path) -> None:
    """With RMSProp and without the distributed optimizer, whose checkpoints have other keys."""
    first = (before / "rmsprop" / "metrics.jsonl").read_bytes()
    assert first.count(b"\n") == 1
    rerun(archive, "train, rmsprop", before)
    assert (before / "rmsprop" / "metrics.jsonl").read_bytes().startswith(first)
    assert_close(rows(before / "rmsprop" / "metrics.jsonl"), rows(after / "rmsprop" / "metrics.jsonl"))


def test_an_interrupted_reference_resumes(archive: Path, before: Path, after: Path) -> None:
    (expected_path,) = (after / "cache").glob("*.npy")
    (partial,) = (before / "cache").glob("*.partial")
    assert partial.stem == expected_path.stem
    scored = np.fromfile(partial).reshape(-1, 2)
    kept = np.isfinite(scored).all(axis=1)
    assert 0 < kept.sum() < len(kept)
    # A changed value shows that scored samples are kept.
    scored[0, 0] += 1
    scored.tofile(partial)
    rerun(archive, "reference", before)
    (path,) = (before / "cache").glob("*.npy")
    assert path.name == expected_path.name and not partial.exists()
    found, expected = np.load(path), np.load(expected_path)
    assert (found[kept] == scored[kept]).all()
    np.testing.assert_allclose(found[~kept], expected[~kept], rtol=1e-5)


def test_checkpoints_are_read(before: Path) -> None:
    """A converted checkpoint equals the model bit for bit; a run's checkpoint is exported with its card."""
    run_in(before, ["tools/convert_checkpoint.py", "verify", "--checkpoint", "ckpt", "--hf", "model"])
    run_in(before, ["tools/convert_checkpoint.py", "export", "--checkpoint", "run", "--output", "third"])
    assert "3 of 6" in (before / "third" / "README.md").read_text()


# --------------------------------------------------------------------------------------------------
# Pairs and evaluation
# --------------------------------------------------------------------------------------------------


def test_interrupted_pairs_resume(archive: Path, before: Path, after: Path) -> None:
    work = before / "generated.jsonl.work" / "part-00-of-01"
    done = {stage: whole_lines(work / f"{stage}.jsonl") for stage in ("documents", "questions", "short", "long")}
    count = {stage: lines.count(b"\n") for stage, lines in done.items()}
    assert count["documents"] == count["questions"] == count["short"] > count["long"] and count["long"] % 2 == 1
    # Two documents are answered together: the one whose neighbour is missing is answered again.
    done["long"] = b"".join(done["long"].splitlines(keepends=True)[:-1])
    rerun(archive, "generate", before)
    for stage, lines in done.items():
        assert (work / f"{stage}.jsonl").read_bytes().startswith(lines), stage
    for name in ("generated.jsonl", "generated.jsonl.rejects.jsonl"):
        assert (before / name).read_bytes() == (after / name).read_bytes(), name


def answers_of(folder: Path, suite: str) -> Path:
    return folder / "evaluation" / suite / "parts" / "0-of-1" / "answers.jsonl"


def assert_resumed(before: Path, after: Path, suite: str, done: bytes) -> None:
    """Earlier answers are kept, nothing is answered twice, and the samples are those of the uninterrupted evaluation."""
    answers = answers_of(before, suite)
    assert answers.read_bytes().startswith(done), suite
    keys = [row["key"] for row in rows(answers)]
    assert len(keys) == len(set(keys)), suite
    samples = [rows(folder / "evaluation" / suite / "samples.jsonl") for folder in (before, after)]
    assert_close(*samples)


def suites_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evaluation" / "results.json").read_text())["suites"])


def test_an_interrupted_evaluation_resumes(archive: Path, before: Path, after: Path) -> None:
    """One suite is finished, two are half done, one has not started; the result compares with an uninterrupted evaluation."""
    done = {suite: whole_lines(answers_of(before, suite)) for suite in ("ruler", "needle", "preference")}
    assert all(done.values()) and not whole_lines(answers_of(before, "infinitebench"))
    suites = ("ruler", "needle", "infinitebench", "preference")
    rerun(archive, "evaluate", before)
    for suite in suites:
        assert_resumed(before, after, suite, done.get(suite, b""))
        assert_close(suites_of(before)[suite], suites_of(after)[suite])
    assert answers_of(before, "needle").read_bytes() == done["needle"]

    command = ["tools/evaluate.py", "--compare", str(after / "evaluation"), "evaluation", "--output", "comparison"]
    run_in(before, command)
    differences = json.loads((before / "comparison" / "comparison.json").read_text())["differences"]
    assert {d["suite"] for d in differences} == set(suites)
    for difference in differences:
        assert difference["paired"]
        assert difference["other_mean"] == pytest.approx(difference["first_mean"], rel=1e-5, abs=NOISE)


def test_an_interrupted_short_context_evaluation_resumes(archive: Path, before: Path, after: Path) -> None:
    # An evaluation is not continued with another version of the harness, on purpose; that is not the point here.
    path = before / "evaluation" / "short" / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "harness": version("lm-eval")}))
    done = whole_lines(answers_of(before, "short"))
    assert done
    rerun(archive, "evaluate, short", before)
    assert_resumed(before, after, "short", done)
    assert_close(suites_of(before)["short"]["metrics"], suites_of(after)["short"]["metrics"])


# --------------------------------------------------------------------------------------------------
# YAML files and flags
# --------------------------------------------------------------------------------------------------


def resolved(folder: Path, program: str, *arguments: str) -> Any:
    return yaml.safe_load(run_in(folder, [*PROGRAMS[program], *arguments, "--print-config"]).stdout)


@pytest.mark.parametrize("program", CONFIGURED)
def test_settings_mean_the_same(archive: Path, program: str) -> None:
    """Defaults, and all keys by YAML and by flags."""
    folder = archive / "settings"
    defaults, values = (yaml.safe_load((folder / f"{program}.{kind}").read_text()) for kind in ("defaults", "yaml"))
    assert_same_settings(resolved(folder, program), defaults)
    assert_same_settings(resolved(folder, program, "--config", f"{program}.defaults"), defaults)
    assert_same_settings(resolved(folder, program, f"--config={program}.yaml"), values)
    flags = json.loads((folder / "flags.json").read_text())[program]
    assert_same_settings(resolved(folder, program, *flags), values)
    underscores = [flag.replace("-", "_").replace("__", "--", 1) if flag.startswith("--") else flag for flag in flags]
    assert_same_settings(resolved(folder, program, *underscores), values)


def test_examples_mean_the_same(archive: Path) -> None:
    folder = archive / "settings"
    for name, program in json.loads((folder / "examples.json").read_text()).items():
        expected = yaml.safe_load((folder / "examples" / f"{name}.resolved").read_text())
        assert_same_settings(resolved(folder, program, "--config", f"examples/{name}"), expected)


def test_no_flag_is_gone(archive: Path) -> None:
    for command, flags in json.loads((archive / "flags.json").read_text()).items():
        words = command.split()
        if not (ROOT / words[0]).exists() and words[0].startswith("tools/benchmark_"):
            words[0] = words[0].replace("tools/", "benchmarks/")
        known = set(run_in(archive, [*words, "--help"]).stdout.replace(",", " ").split())
        assert not set(flags) - known, command


CHANGES = """--rotary-base 1e5 --rope-type yarn --rotary-scaling-factor 4 --attention-factor 1.1 --beta-fast 16 --beta-slow 2
    --low-freq-factor 1 --high-freq-factor 4 --original-max-position-embeddings 512 --max-position-embeddings 2048"""
CHECKS = """--no-logits --text text --tokens 8 --rows 2 --seed 3 --first-position 5 --bound 1e-3 --whole
    --report report.json"""
COMMAND_LINES = [
    f"tools/convert_checkpoint.py import --hf gone --output x --dtype bfloat16 --name n {CHANGES}",
    f"""tools/convert_checkpoint.py export --checkpoint gone --output x --dtype float16 --max-shard-size 500MB --no-verify
    {CHANGES} {CHECKS}""",
    f"tools/convert_checkpoint.py verify --checkpoint gone --hf model {CHANGES} {CHECKS}",
    """tools/preprocess_preference_data.py --input gone gone2 --output-prefix x --tokenizer model --chat-template chatml
    --seq-length 9 --short-seq-length 9 --workers 2 --restart --trust-remote-code""",
    "tools/preprocess_preference_data.py --input gone --output-prefix x --vocab-size 9",
    "tools/generate_preference_data.py merge --output gone",
    "tools/generate_preference_data.py --restart --documents gone --model model --output x",
    "tools/evaluate.py --compare gone gone2 --output x --seed 3",
    "tools/evaluate.py --restart --model model --tasks needle --haystack gone --output x",
]


@pytest.mark.parametrize("line", COMMAND_LINES, ids=lambda line: " ".join(line.split()[:2]))
def test_flags_are_accepted_together(archive: Path, tmp_path: Path, line: str) -> None:
    """The only error is about the input, which does not exist."""
    (tmp_path / "model").symlink_to(archive / "before" / "model")
    (tmp_path / "text").write_text("text")
    (error,) = [e for e in run_in(tmp_path, line.split(), expect=2).stderr.splitlines() if e.startswith("error:")]
    assert "gone" in error
