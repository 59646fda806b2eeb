"""The plan of rounds, the draw of held-out samples, gates, records, status and report, without running a command."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.commands.evolve import _planner as planner_of
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evolution import run, slurm
from megatron_longpo.evolution.gate import decide, describe, origin_of, read_gate, write_gate
from megatron_longpo.evolution.plan import Origin, Planner, Stage
from megatron_longpo.evolution.records import Record, fingerprint, fingerprint_of, read_record, write_record
from megatron_longpo.evolution.report import write_report
from megatron_longpo.evolution.settings import GateRule, merged
from megatron_longpo.evolution.split import split_pairs
from megatron_longpo.evolution.status import read_status
from megatron_longpo.runtime.files import HOLDER_FILE, FolderLock
from megatron_longpo.runtime.status import StatusFile
from tests.support.rounds import write_rounds


def planner(folder: Path, **changes: Any) -> Planner:
    return planner_of(str(write_rounds(folder, **changes)))


def stages(plans: Planner, index: int = 0) -> dict[str, Stage]:
    origin = origin_of(plans, index)
    assert origin is not None
    return {stage.name: stage for stage in plans.stages(plans.evolution.rounds[index], origin)}


def done(stage: Stage, seconds: float = 10.0, state: str = "done") -> None:
    """A record, as if the stage had been run."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    settings = run.settings_of(stage)
    write_record(stage.folder, Record(state, "", settings, run.outputs_of(stage), seconds, 2, 1, 0))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------


def test_what_a_round_says_comes_before_the_defaults() -> None:
    assert merged({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"c": [2], "e": 3}}) == {
        "a": {"b": 1, "c": [2], "e": 3},
        "d": 2,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round": []}, "'round' is unknown; did you mean 'rounds'"),
        ({"rounds": []}, "list at least one round"),
        ({"rounds": [{"name": "a"}, {"name": "a"}]}, "round 2 has the name 'a' of another round"),
        ({"rounds": [{"name": "../a"}]}, "is not a name; use letters"),
        ({"rounds": [{"trian": {}}]}, "'trian', which is unknown; did you mean 'train'"),
        ({"evolve": {"model": None}}, "evolve.model is not given"),
        ({"evolve": {"held_out_fraction": 1.0}}, r"held_out_fraction=1.0 must be in \[0, 1\)"),
        ({"resources": {"trian": {}}}, "'trian', which is not a stage"),
        ({"resources": {"train": {"array": 4}}}, "only generate and evaluate can be divided"),
        ({"resources": {"generate": {"array": 4, "nproc_per_node": 8}}}, "give each task one process"),
        ({"rounds": [{"gate": [{"suite": "ruler"}]}]}, "has no bound; give at_least or at_most"),
        ({"rounds": [{"gate": [{"at_least": 0}]}]}, "has no suite"),
        ({"defaults": {"train": {"optimizer": {"lr": -1.0}}}}, "lr=-1.0 must be"),
        ({"defaults": {"train": {"optimizer": {"rl": 1.0}}}}, "round first: train: optimizer.rl is unknown"),
        ({"defaults": {"train": {"data": {"data_path": "x"}}}}, "train: data.data_path is set by the evolution"),
        ({"defaults": {"preprocess": {"output_prefix": "x"}}}, "preprocess.output_prefix is set by the evolution"),
        ({"defaults": {"import": {"rotray_base": 1e6}}}, "import.rotray_base is unknown; did you mean 'rotary_base'"),
        ({"defaults": {"export": {"max_shard_size": "many"}}}, "export refuses its settings, as said above"),
        ({"defaults": {"generate": {"engine": {"engine": "openai"}}}}, "asks a server, which serves one model"),
        ({"defaults": {"evaluate": {"evaluate": {"tasks": ["rular"]}}}}, "rular"),
        ({"methods": {"a b": {}}}, "'a b' is not a name"),
        (
            {"rounds": [{"methods": {"longop": {}}}]},
            "methods has 'longop', which is none of the file's; did you mean 'longpo'",
        ),
        ({"rounds": [{"methods": []}]}, "methods holds a list; it must be a mapping"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_runs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planner(tmp_path, **changes).check()


def test_a_gate_needs_an_evaluation(tmp_path: Path) -> None:
    rounds = [{"name": "first", "gate": [{"suite": "needle", "at_least": 0.0}]}]
    path = write_rounds(tmp_path, rounds=rounds, defaults={"evaluate": None})
    with pytest.raises(ConfigError, match="has a gate but no evaluation"):
        planner_of(str(path)).check()


def test_what_all_processes_compute_together_is_not_divided(tmp_path: Path) -> None:
    changes = {"evolve": {"executor": "slurm"}, "resources": {"evaluate": {"array": 2}}}
    with pytest.raises(ConfigError, match=r"resources\.evaluate\.array=2 divides the samples"):
        planner_of(str(write_rounds(tmp_path, **changes))).check()


# --------------------------------------------------------------------------------------------------
# Plan
# --------------------------------------------------------------------------------------------------


def test_the_stages_of_a_round(tmp_path: Path) -> None:
    plans = planner(tmp_path, methods={"longpo": {}, "sft": {"objective": {"objective": "sft"}}})
    found = stages(plans)
    assert list(found) == [
        *("generate", "split", "preprocess", "preprocess-held-out", "import", "evaluate-before"),
        *("reference:longpo", "train:longpo", "export:longpo", "evaluate:longpo"),
        *("train:sft", "export:sft", "evaluate:sft", "compare", "gate"),
    ]
    assert found["train:sft"].config is not None
    assert found["train:sft"].config["objective"] == {"objective": "sft"}
    assert found["train:sft"].config["data"]["data_path"] == str(tmp_path / "rounds" / "first" / "data")
    reference = found["reference:longpo"].config
    assert reference is not None and reference["reference"]["reference_only"] is True
    assert "optimizer" not in reference and reference["training"] == {"global_batch_size": 2}
    # Nothing comes before what it needs.
    seen: set[str] = set()
    for stage in found.values():
        assert set(stage.after) <= seen
        seen.add(stage.id)


def test_a_round_may_change_a_method(tmp_path: Path) -> None:
    methods = {"longpo": {}, "dpo": {"objective": {"objective": "dpo", "beta": 0.2}}}
    own = {"dpo": {"objective": {"beta": 0.3}, "reference": {"reference_rotary_base": 1e6}}}
    plans = planner(tmp_path, methods=methods, rounds=[{"name": "first", "methods": own}, {"name": "second"}])
    origin = Origin(tmp_path / "model")
    first, second = (
        {s.name: s.config for s in plans.stages(r, origin) if s.config is not None} for r in plans.evolution.rounds
    )
    assert first["train:dpo"]["objective"] == {"objective": "dpo", "beta": 0.3}
    assert first["train:dpo"]["reference"]["reference_rotary_base"] == 1e6
    assert first["reference:dpo"]["reference"]["reference_rotary_base"] == 1e6
    assert second["train:dpo"]["objective"] == {"objective": "dpo", "beta": 0.2}
    assert "reference_rotary_base" not in second["train:dpo"].get("reference", {})


def test_each_run_has_a_place_of_its_own_in_a_store(tmp_path: Path) -> None:
    defaults = {"train": {"checkpoint": {"upload_to": "s3://bucket/evolution/"}}}
    plans = planner(tmp_path, defaults=defaults, methods={"longpo": {}, "sft": {"objective": {"objective": "sft"}}})
    found = [s.config for s in stages(plans).values() if s.name.startswith("train:") and s.config is not None]
    places = [config["checkpoint"]["upload_to"] for config in found]
    assert places == ["s3://bucket/evolution/first/longpo", "s3://bucket/evolution/first/sft"]


def test_without_held_out_data_and_evaluation(tmp_path: Path) -> None:
    plans = planner(tmp_path, evolve={"held_out_fraction": 0.0}, defaults={"evaluate": None})
    assert not {"preprocess-held-out", "evaluate-before", "compare"} & set(stages(plans))
    assert stages(plans)["gate"].after == ("first/export:longpo",)


@pytest.mark.parametrize(
    ("decision", "model"), [("go", "rounds/first/longpo/model"), ("back", "model"), ("stop", None), (None, None)]
)
def test_the_gate_decides_which_model_the_next_round_begins_with(
    tmp_path: Path, decision: str | None, model: str | None
) -> None:
    plans = planner(tmp_path)
    if decision:
        (tmp_path / "rounds" / "first").mkdir(parents=True)
        write_gate(plans.folder("first").gate, {"decision": decision, "rules": []})
    origin = origin_of(plans, 1)
    assert (origin and origin.model) == (model and tmp_path / model)
    if model == "model":
        assert origin == Origin(tmp_path / "model")


def test_flags_of_a_stage_are_as_the_command_reads_them(tmp_path: Path) -> None:
    changes = {
        "preprocess": {"max_turns": 5, "restart": False},
        "import": {"rotary_base": 1e7, "dtype": "bfloat16"},
        "export": {"verify": False},
    }
    found = stages(planner(tmp_path, defaults=changes))
    assert found["preprocess"].flags[-2:] == ("--max-turns", "5")
    assert found["import"].flags[-4:] == ("--dtype", "bfloat16", "--rotary-base", "10000000.0")
    assert found["export:longpo"].flags[-1] == "--no-verify"


def test_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = {"train": {"nodes": 2, "nproc_per_node": 8}, "generate": {"array": 3}}
    plans = planner(tmp_path, evolve={"nproc_per_node": 4}, resources=resources)
    found = stages(plans)
    assert run.launcher(found["import"])[-3:] == ["--nproc-per-node", "4", "--standalone"]
    assert found["reference:longpo"].resources == found["train:longpo"].resources
    assert len(run.launcher(found["split"])) == 1 == len(run.launcher(found["generate"]))
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    line = run.launcher(found["train:longpo"])
    assert line[0] == "srun" and line[line.index("--rdzv-endpoint") + 1] == "node1:20077"
    assert line[line.index("--nnodes") + 1] == "2" and "--standalone" not in line


# --------------------------------------------------------------------------------------------------
# Split
# --------------------------------------------------------------------------------------------------


def pairs_file(path: Path, names: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": name, "context": "x"}) + "\n" for name in names))
    return path


def test_the_samples_of_a_document_stay_together(tmp_path: Path) -> None:
    names = [f"book{document}-{part:012x}" for document in range(10) for part in range(3)]
    source, train, held = (tmp_path / name for name in ("pairs", "train", "held"))
    split_pairs(pairs_file(source, names), train, held, fraction=0.2, seed=1)
    ids = [[json.loads(line)["id"] for line in path.read_text().splitlines()] for path in (train, held)]
    assert sorted(ids[0] + ids[1]) == sorted(names) and len(ids[1]) == 6
    assert ids[0] == [name for name in names if name in set(ids[0])], "in the order of the file"
    assert not {name[:5] for name in ids[0]} & {name[:5] for name in ids[1]}
    again = tmp_path / "again"
    split_pairs(source, train, again, fraction=0.2, seed=1)
    assert again.read_bytes() == held.read_bytes()
    split_pairs(source, train, again, fraction=0.2, seed=2)
    assert again.read_bytes() != held.read_bytes()


def test_at_least_one_document_is_on_each_side(tmp_path: Path) -> None:
    source = pairs_file(tmp_path / "pairs", ["a-000000000000", "b-000000000000"])
    train, held = tmp_path / "train", tmp_path / "held"
    for fraction in (0.001, 0.999):
        split_pairs(source, train, held, fraction=fraction, seed=0)
        assert len(train.read_text().splitlines()) == len(held.read_text().splitlines()) == 1
    with pytest.raises(DataError, match="all samples are of one document"):
        split_pairs(pairs_file(source, ["a-000000000000"]), train, held, fraction=0.5, seed=0)
    with pytest.raises(DataError, match="holds no sample"):
        split_pairs(pairs_file(source, []), train, held, fraction=0.5, seed=0)


# --------------------------------------------------------------------------------------------------
# Gate
# --------------------------------------------------------------------------------------------------


def comparison(folder: Path) -> Path:
    """Of an evaluation that gained 0.1 at one length, and lost 0.2 in another suite's mean over two."""
    line = {"other": "longpo", "is_clear": True, "paired": True, "samples": 10}
    differences = [
        {
            **line,
            "suite": "ruler",
            "name": "average",
            "length": "512",
            "first_mean": 0.5,
            "other_mean": 0.6,
            "low": 0.05,
            "high": 0.15,
        },
        {
            **line,
            "suite": "short",
            "name": "average",
            "length": "0",
            "first_mean": 0.5,
            "other_mean": 0.4,
            "low": -0.2,
            "high": 0.0,
        },
        {
            **line,
            "suite": "short",
            "name": "average",
            "length": "all",
            "first_mean": 0.5,
            "other_mean": 0.3,
            "low": -0.3,
            "high": -0.1,
        },
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps({"differences": differences}))
    return folder


@pytest.mark.parametrize(
    ("rules", "decision"),
    [
        ([], "go"),
        ([GateRule(suite="ruler", at_least=0.05)], "go"),
        ([GateRule(suite="ruler", figure="low", at_least=0.05, at_most=0.05)], "go"),
        ([GateRule(suite="ruler", figure="other_mean", at_least=0.61)], "stop"),
        ([GateRule(suite="short", at_least=-0.19, otherwise="back")], "back"),
        ([GateRule(suite="short", length="0", at_least=-0.19, otherwise="back")], "go"),
        ([GateRule(suite="short", at_least=0.0, otherwise="back"), GateRule(suite="ruler", at_most=0.0)], "stop"),
    ],
)
def test_the_most_severe_rule_decides(tmp_path: Path, rules: list[GateRule], decision: str) -> None:
    content = decide(rules, comparison(tmp_path / "comparison"), "longpo")
    write_gate(tmp_path / "gate.json", content)
    assert read_gate(tmp_path / "gate.json") == decision == content["decision"]
    assert all(rule.suite in describe(content) for rule in rules)


def test_a_rule_about_no_line_names_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"about needle average all, .* has only ruler average 512, short average 0"):
        decide([GateRule(suite="needle", at_least=0.0)], comparison(tmp_path / "comparison"), "longpo")


def test_a_damaged_gate_file_is_named(tmp_path: Path) -> None:
    for text in ("{", '{"decision": "perhaps"}', "[]"):
        (tmp_path / "gate.json").write_text(text)
        with pytest.raises(DataError, match=r"gate\.json: holds no decision"):
            read_gate(tmp_path / "gate.json")


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


def test_fingerprints_see_content_names_and_size(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"x" * 200_000)
    first = fingerprint_of(folder)
    (folder / ".holder.json").write_text("a lock is no output")
    assert fingerprint_of(folder) == first
    for change in (
        lambda: (folder / "a").write_bytes(b"x" * 200_001),
        lambda: (folder / "a").write_bytes(b"x" * 199_999 + b"y"),
        lambda: (folder / "a").rename(folder / "b"),
        lambda: (folder / "b").unlink(),
    ):
        change()
        assert fingerprint_of(folder) != first
    assert fingerprint_of(tmp_path / "nothing") == "" == fingerprint_of(tmp_path / "no*")


def test_another_setting_of_a_finished_stage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "texts").mkdir()
    done(stages(planner(tmp_path))["train:longpo"])
    changed = planner(tmp_path, defaults={"train": {"optimizer": {"lr": 2e-5}}})
    with pytest.raises(
        ConfigError, match=r"first/train:longpo is done, but with another config\.optimizer\.lr; .*--redo"
    ):
        run.run_rounds(changed)


def test_a_stage_is_not_taken_as_done_with_what_was_made_anew(tmp_path: Path) -> None:
    """A record that somebody removed lets its stage run again; what was made from its old outputs is then refused."""
    for name in ("model", "texts"):
        (tmp_path / name).mkdir()
    plans = planner(tmp_path)
    found = stages(plans)
    for made in ("train.jsonl", "held_out.jsonl"):
        (plans.folder("first").root / made).parent.mkdir(parents=True, exist_ok=True)
        (plans.folder("first").root / made).write_text("{}\n")
    done(found["split"])
    split = read_record(found["split"].folder)
    assert split is not None
    stage = found["preprocess"]
    settings = run.settings_of(stage)
    stage.folder.mkdir(parents=True)
    record = Record("done", fingerprint(settings, [("first/split", split.outputs)]), settings, "", 1.0, 1, 1, 0)
    run._check_same(plans, stage, record)
    (plans.folder("first").root / "train.jsonl").write_text("{}\n{}\n")
    done(found["split"])
    with pytest.raises(
        ConfigError, match=r"first/preprocess is done, but first/split made something else since; .*--redo"
    ):
        run._check_same(plans, stage, record)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"state": "done"}')
    with pytest.raises(DataError, match=r"record\.json: is not the record of a stage .* --redo"):
        read_record(tmp_path)


def test_redo_moves_what_follows_aside_and_nothing_else(tmp_path: Path) -> None:
    plans = planner(tmp_path)
    for stage in stages(plans).values():
        done(stage)
    write_gate(plans.folder("first").gate, {"decision": "go", "rules": []})
    for stage in stages(plans, 1).values():
        done(stage)
    run.redo(plans, "first/train:longpo")
    states = {status.stage.id: status.word for status in read_status(plans)}
    left = {name for name, state in states.items() if state == "done"}
    assert left == {
        f"first/{name}"
        for name in (
            "generate",
            "split",
            "preprocess",
            "preprocess-held-out",
            "import",
            "evaluate-before",
            "reference:longpo",
        )
    }
    assert not plans.folder("first").gate.exists()
    assert (tmp_path / "rounds/first/redone/gate-1/gate.json").exists()


# --------------------------------------------------------------------------------------------------
# Status, report, jobs
# --------------------------------------------------------------------------------------------------


def test_status_estimates_from_the_round_before(tmp_path: Path) -> None:
    plans = planner(tmp_path)
    done(stages(plans)["generate"], seconds=100.0)
    done(stages(plans)["split"], state="running")
    write_gate(plans.folder("first").gate, {"decision": "go", "rules": []})
    done(stages(plans, 1)["generate"], seconds=30.0, state="failed")
    found = {status.stage.id: status for status in read_status(plans)}
    assert found["first/generate"].word == "done" and found["first/generate"].process_hours == pytest.approx(
        2 * 100 / 3600
    )
    assert found["first/split"].word == "interrupted" and found["first/preprocess"].word == "waiting"
    assert found["second/generate"].seconds_left == 70.0 and found["second/split"].seconds_left is None


def test_parts_of_a_stage_are_counted_while_their_tasks_run(tmp_path: Path) -> None:
    plans = planner(tmp_path, resources={"generate": {"array": 3}})
    folder = stages(plans)["generate"].folder
    folder.mkdir(parents=True)
    words = []
    for name in ("config.yaml", "log-part-0.txt", "part-0.json", "part-2.json"):
        (folder / name).touch()
        words.append(read_status(plans)[0].word)
    assert words == ["waiting", "0 of 3 parts", "1 of 3 parts", "2 of 3 parts"]
    done(stages(plans)["generate"], seconds=1.0)
    assert read_status(plans)[0].word == "done"


def test_a_stage_runs_as_long_as_its_process(tmp_path: Path) -> None:
    plans = planner(tmp_path)
    stage = stages(plans)["split"]
    done(stage, state="running")
    with FolderLock(stage.folder, record=True):
        assert {s.stage.id: s.word for s in read_status(plans)}["first/split"] == "running"
        held = (stage.folder / HOLDER_FILE).read_text()
    # As a killed process leaves it: no process has this number.
    (stage.folder / HOLDER_FILE).write_text(held.replace(f'"process": {os.getpid()}', '"process": 99999999'))
    assert {s.stage.id: s.word for s in read_status(plans)}["first/split"] == "interrupted"


def test_the_report_shows_what_is_there_and_escapes_it(tmp_path: Path) -> None:
    plans = planner(tmp_path)
    comparison(plans.folder("first").comparison)
    run_folder = plans.folder("first").run("longpo")
    run_folder.mkdir(parents=True)
    (run_folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3')
    (run_folder / "curves.png").write_bytes(b"a picture")
    path = tmp_path / "report.html"
    (tmp_path / "rounds.yaml").write_text((tmp_path / "rounds.yaml").read_text() + "# <script>\n")
    write_report(planner_of(str(tmp_path / "rounds.yaml")), path)
    page = path.read_text()
    assert "<td>loss</td><td>2</td><td>1</td>" in page
    assert "<td>50.0</td><td>60.0</td><td>+10.0</td><td>[+5.0, +15.0] *</td>" in page
    assert "YSBwaWN0dXJl" in page and "not decided" in page
    assert "&lt;script&gt;" in page and "<script>" not in page and 'src="http' not in page


def test_training_that_was_broken_off_is_told_from_training_that_failed(tmp_path: Path) -> None:
    assert not run._goes_on(tmp_path, 60.0)
    file = StatusFile(tmp_path, train_iters=9)
    for state, goes_on in (("running", True), ("stopped", True), ("failed", False), ("finished", False)):
        file.write(state, step=3)  # type: ignore[arg-type]
        assert run._goes_on(tmp_path, 60.0) == goes_on
    # The sign of life is that of a launch before.
    file.write("running", step=3)
    assert not run._goes_on(tmp_path, -1.0)


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (1, False), (0, False)])
def test_a_job_whose_stage_was_broken_off_is_requeued(tmp_path: Path, status: int, requeued: bool) -> None:
    """The job's own shell, with a stand-in for scontrol."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$1" = show ] && echo node0 || echo "$*" >requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    script = slurm._SCRIPT.replace("COMMAND", f"sh -c 'echo $MASTER_ADDR >master; exit {status}'")
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    ended = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=variables, check=False).returncode
    assert ended == status and (tmp_path / "requeued").exists() == requeued
    assert (tmp_path / "master").read_text() == "node0\n"


def test_threads_are_the_cores_that_the_job_has_on_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the machine, nor those of the login node: two threads on a core that is shared wait for each other."""
    plans = planner(tmp_path, resources={"train": {"nproc_per_node": 2}})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores, names in (("6", {"generate": "6", "train:longpo": "3"}), ("1", {"generate": "1", "train:longpo": "1"})):
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", cores)
        for name, threads in names.items():
            assert run.environment(stages(plans)[name])["OMP_NUM_THREADS"] == threads
    monkeypatch.delenv("SLURM_CPUS_ON_NODE")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 4})
    assert run.environment(stages(plans)["generate"])["OMP_NUM_THREADS"] == "3"


def test_jobs_depend_on_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for sbatch and squeue; the real ones are tried where there is a Slurm."""
    for name, body in (
        (
            "sbatch",
            'echo "${OMP_NUM_THREADS-not set}" >"$JOBS.threads"\n'
            'n=$(wc -l <"$JOBS"); echo "$*" | tr "\\n" " " >>"$JOBS"; echo >>"$JOBS"; echo "$((n + 100));cluster"',
        ),
        ("squeue", "echo 101"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    jobs = tmp_path / "jobs"
    jobs.write_text("")
    monkeypatch.setenv("JOBS", str(jobs))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    resources = {"generate": {"array": 3}, "train": {"nodes": 2, "sbatch": ["--time=1:00:00"]}}
    plans = planner(tmp_path, evolve={"executor": "slurm"}, resources=resources)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = slurm.submit(plans)
    assert (tmp_path / "jobs.threads").read_text() == "not set\n"
    lines = jobs.read_text().splitlines()
    assert "--array=0-2" in lines[0] and "--part" in lines[0] and "--finish" in lines[1]
    assert found["first/generate"] == "101" and "--dependency=afterok:100" in lines[1]
    split = next(line for line in lines if "--job-name=evolve:first/split" in line)
    assert "--dependency=afterok:101" in split and "--stage first/split" in split
    train = next(line for line in lines if "evolve:first/train:longpo" in line)
    assert "--nodes=2" in train and "--time=1:00:00" in train and "--kill-on-invalid-dep=yes" in train
    second = next(line for line in lines if "evolve:second/generate" in line)
    assert found["first/gate"] in second and found["first/export:longpo"] in second
    # Submitted again, only what is neither done nor queued is.
    done(stages(plans)["split"])
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    again = slurm.submit(plans)
    assert (tmp_path / "jobs.threads").read_text() == "5\n"
    assert "first/split" not in again and again["first/generate"] == "101"
    assert len(jobs.read_text().splitlines()) == 2 * len(lines) - 3
