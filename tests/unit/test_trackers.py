"""Trackers: one interface, opened before long work; a resumed run continues the same record."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import requests

from megatron_longpo.config import Config, LoggingConfig
from megatron_longpo.errors import ConfigError
from megatron_longpo.training import trackers
from megatron_longpo.training.metrics import REPORTED, SAMPLE_METRICS
from megatron_longpo.training.trackers import open_trackers
from tests.support.launch import ROOT
from tests.support.runs import TIMED


def config(**logging: Any) -> Config:
    return Config(logging=LoggingConfig(**{"tensorboard": False, **logging}))


def track(output: Path, settings: Config, steps: range) -> None:
    """Open all trackers, log a value per step, and close them."""
    opened = open_trackers(settings, output)
    for step in steps:
        for tracker in opened:
            tracker.log({"loss": step / 10, "rewards/margins": float(step)}, step)
    for tracker in opened:
        tracker.close()


def test_tensorboard_has_each_step_once(tmp_path: Path) -> None:
    """A run that resumes after step 2 logs step 3 again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(tmp_path, config(tensorboard=True), range(4))
    track(tmp_path, config(tensorboard=True), range(3, 6))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, round(event.value, 6)) for event in events.Scalars("loss")]
    assert found == [(step, step / 10) for step in range(6)]
    assert not (tmp_path / "trackers.json").exists()


def test_mlflow_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="extra `mlflow` is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = f"file:{tmp_path / 'store'}"
    settings = config(mlflow_experiment="longpo", mlflow_run_name="first", mlflow_tracking_uri=store)
    track(tmp_path, settings, range(1, 3))
    track(tmp_path, settings, range(3, 5))
    client = mlflow.MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("longpo")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first" and run.info.status == "FINISHED"
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": run.info.run_id}
    history = client.get_metric_history(run.info.run_id, "rewards/margins")
    assert [(metric.step, metric.value) for metric in history] == [(step, float(step)) for step in range(1, 5)]
    assert run.data.params["objective.beta"] == "0.1"
    with pytest.raises(ConfigError, match="mlflow_experiment=longpo: mlflow cannot be opened"):
        open_trackers(config(mlflow_experiment="longpo", mlflow_tracking_uri="nowhere://x"), tmp_path)


def test_swanlab_writes_offline(tmp_path: Path) -> None:
    pytest.importorskip("swanlab", reason="extra `swanlab` is not installed")
    track(tmp_path, config(swanlab_project="longpo", swanlab_mode="offline"), range(1, 3))
    assert any((tmp_path / "swanlab").rglob("*"))


def test_weights_and_biases_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = config(wandb_project="longpo")
    track(tmp_path, settings, range(1, 3))
    before = json.loads((tmp_path / "trackers.json").read_text())
    track(tmp_path, settings, range(3, 4))
    assert json.loads((tmp_path / "trackers.json").read_text()) == before
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_tracker_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: Any) -> Any:
        raise OSError("no route to host")

    kind = trackers._KINDS["swanlab"]
    monkeypatch.setitem(trackers._KINDS, "swanlab", trackers._Kind(kind.field, kind.package, kind.install, refuse))
    with pytest.raises(ConfigError, match=r"swanlab_project=p: swanlab cannot be opened \(OSError: no route to host\)"):
        open_trackers(config(swanlab_project="p"), tmp_path)


# --------------------------------------------------------------------------------------------------
# Prometheus
# --------------------------------------------------------------------------------------------------


def test_prometheus_reads_the_latest_step_from_a_file(tmp_path: Path) -> None:
    output = tmp_path / "my run"
    output.mkdir()
    track(output, config(prometheus_file=str(tmp_path / "collected" / "longpo.prom")), range(1, 4))
    lines = (tmp_path / "collected" / "longpo.prom").read_text().splitlines()
    assert 'longpo_loss{run="my run"} 0.3' in lines and 'longpo_step{run="my run"} 3.0' in lines
    assert 'longpo_rewards_margins{run="my run"} 3.0' in lines
    with pytest.raises(ConfigError, match=r"reads only files that end in \.prom"):
        open_trackers(config(prometheus_file="metrics.txt"), tmp_path)


def test_prometheus_scrapes_a_port(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tracker,) = open_trackers(config(prometheus_port=port), tmp_path)
    tracker.log({"loss": 0.5}, 1)
    with pytest.raises(ConfigError, match=r"prometheus_port=\d+: Prometheus' endpoint cannot be opened"):
        open_trackers(config(prometheus_port=port), tmp_path)
    text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    tracker.close()
    assert f'longpo_loss{{run="{tmp_path.name}"}} 0.5' in text
    # The port is free again, as a run that resumes on the same machine needs it.
    (again,) = open_trackers(config(prometheus_port=port), tmp_path)
    again.close()


def test_the_dashboard_asks_for_metrics_that_there_are(tmp_path: Path) -> None:
    """Names of a step's metrics, and those of held-out data with ``valid/`` before them."""
    of_step = (*SAMPLE_METRICS, "grad_norm", "lr", "mfu", *TIMED)
    names = {*of_step, *(f"valid/{name}" for name in REPORTED), "step", "last_step_timestamp_seconds"}
    known = {"longpo_" + name.replace("/", "_") for name in names}
    dashboard = json.loads((ROOT / "examples" / "grafana" / "longpo.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    found = {name for text in asked for name in re.findall(r"longpo_\w+", text)}
    assert len(found) > 12 and found <= known
    assert all('{run=~"$run"}' in text for text in asked)
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "run"}
