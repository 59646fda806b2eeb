"""Experiment trackers: TensorBoard, Weights & Biases, MLflow, SwanLab and Prometheus behind one interface.

They are opened before any long work, so that a package, a server or credentials that are missing are known then. What a resumed
run needs to continue the same record is kept in OUTPUT/trackers.json.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.config import Config, LoggingConfig
from megatron_longpo.errors import ConfigError, one_line
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.log import log

_RECORD = "trackers.json"
# MLflow's limits: parameters per call, and characters of a value.
_MLFLOW_PARAMS, _MLFLOW_CHARACTERS = 100, 500


class Tracker(ABC):
    """Receives the metrics of a run, on rank 0."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of a step by name."""

    @abstractmethod
    def close(self) -> None:
        """The run has ended, or stopped to be continued later."""


class TensorBoard(Tracker):
    """Event files.

    Args:
        folder: folder that they are written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Not shown any more: what a killed run logged after the checkpoint that this one resumes from.
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Tracker):
    """A run at Weights & Biases.

    Args:
        run: what ``wandb.init`` returned.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """A run of an MLflow experiment.

    Args:
        client: client of the tracking server.
        run_id: id of the run there.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class SwanLab(Tracker):
    """A SwanLab run.

    Args:
        run: what ``swanlab.init`` returned.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({name: float(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class Prometheus(Tracker):
    """The latest metrics as gauges, at a port or in a file.

    A gauge is named ``longpo_`` and the metric's name, with ``_`` for what Prometheus does not allow, and has the label ``run``.

    Args:
        run: name of the run.
        port: port to listen at, or None.
        path: file to write, or None.
    """

    def __init__(self, run: str, *, port: int | None = None, path: Path | None = None) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._run, self._path = run, path
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._server = None if port is None else start_http_server(port, registry=self._registry)[0]

    def log(self, values: Mapping[str, float], step: int) -> None:
        from prometheus_client import Gauge, write_to_textfile

        for name, value in {**values, "step": step, "last_step_timestamp_seconds": time.time()}.items():
            if name not in self._gauges:
                gauge = "longpo_" + re.sub(r"\W", "_", name)
                self._gauges[name] = Gauge(gauge, f"Metric {name} of a training run", ["run"], registry=self._registry)
            self._gauges[name].labels(self._run).set(value)
        if self._path is not None:
            # A full disk ends no run for want of a gauge: the next step writes them all again.
            with contextlib.suppress(OSError):
                write_to_textfile(str(self._path), self._registry)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


@dataclass(frozen=True)
class _Request:
    """What a tracker is opened for.

    Attributes:
        config: configuration of the run.
        output: the run's folder.
        run_id: id of the record to continue; None: a new one.
    """

    config: Config
    output: Path
    run_id: str | None


@dataclass(frozen=True)
class _Kind:
    """How a tracker is asked for and opened.

    Attributes:
        field: field of the logging section that asks for it.
        package: package that it needs.
        install: how that is installed.
        open: opens it; returns it with the id of its record, if it has one.
    """

    field: str
    package: str
    install: str
    open: Callable[[_Request], tuple[Tracker, str | None]]


def _open_tensorboard(request: _Request) -> tuple[Tracker, None]:
    return TensorBoard(request.output / "tensorboard"), None


def _open_wandb(request: _Request) -> tuple[Tracker, str]:
    import wandb

    settings = request.config.logging
    run = wandb.init(
        project=settings.wandb_project,
        name=settings.wandb_exp_name,
        config=request.config.as_dict(),
        dir=str(request.output),
        id=request.run_id,
        resume="allow",
    )
    return WeightsAndBiases(run), str(run.id)


def _open_mlflow(request: _Request) -> tuple[Tracker, str]:
    from mlflow import MlflowClient
    from mlflow.entities import Param

    settings = request.config.logging
    client = MlflowClient(tracking_uri=settings.mlflow_tracking_uri)
    if request.run_id is not None:
        client.update_run(request.run_id, status="RUNNING")
        return MLflow(client, request.run_id), request.run_id
    name = settings.mlflow_experiment
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment is not None else client.create_experiment(name)
    run_id = str(client.create_run(number, run_name=settings.mlflow_run_name).info.run_id)
    flat = [
        Param(f"{section}.{key}", str(value)[:_MLFLOW_CHARACTERS])
        for section, values in request.config.as_dict().items()
        for key, value in values.items()
    ]
    for start in range(0, len(flat), _MLFLOW_PARAMS):
        client.log_batch(run_id, params=flat[start : start + _MLFLOW_PARAMS])
    return MLflow(client, run_id), run_id


def _open_swanlab(request: _Request) -> tuple[Tracker, str]:
    import swanlab

    settings = request.config.logging
    run = swanlab.init(
        project=settings.swanlab_project,
        name=settings.swanlab_exp_name,
        config=request.config.as_dict(),
        mode=settings.swanlab_mode,
        log_dir=str(request.output / "swanlab"),
        id=request.run_id,
        resume="allow",
    )
    return SwanLab(run), str(run.id)


def _open_prometheus_port(request: _Request) -> tuple[Tracker, None]:
    return Prometheus(request.output.name, port=request.config.logging.prometheus_port), None


def _open_prometheus_file(request: _Request) -> tuple[Tracker, None]:
    path = Path(str(request.config.logging.prometheus_file))
    if path.suffix != ".prom":
        raise ValueError("the collector reads only files that end in .prom")
    path.parent.mkdir(parents=True, exist_ok=True)
    return Prometheus(request.output.name, path=path), None


_INSTALL_PROMETHEUS = "pip install prometheus-client"
_KINDS = {
    "tensorboard": _Kind("tensorboard", "tensorboard", "pip install tensorboard", _open_tensorboard),
    "wandb": _Kind("wandb_project", "wandb", "pip install wandb", _open_wandb),
    "mlflow": _Kind("mlflow_experiment", "mlflow", "pip install mlflow-skinny, or mlflow", _open_mlflow),
    "Prometheus' endpoint": _Kind("prometheus_port", "prometheus_client", _INSTALL_PROMETHEUS, _open_prometheus_port),
    "Prometheus' file": _Kind("prometheus_file", "prometheus_client", _INSTALL_PROMETHEUS, _open_prometheus_file),
    "swanlab": _Kind("swanlab_project", "swanlab", "pip install swanlab", _open_swanlab),
}


def check_trackers(logging: LoggingConfig) -> None:
    """Check that the packages of all trackers that are asked for are installed.

    Raises:
        ConfigError: the first that is not.
    """
    for kind in _KINDS.values():
        value = getattr(logging, kind.field)
        if value and importlib.util.find_spec(kind.package) is None:
            off = f"--no-{kind.field}" if value is True else f"leave out --{kind.field.replace('_', '-')}"
            raise ConfigError(
                f"{kind.field}={value} needs the package {kind.package}, which is not installed; {kind.install}, or {off}"
            )


def open_trackers(config: Config, output: Path) -> list[Tracker]:
    """Open all trackers that a run asks for; on rank 0.

    Args:
        config: configuration of the run.
        output: the run's folder, which exists.

    Raises:
        ConfigError: one of them cannot be opened.
    """
    path = output / _RECORD
    try:
        ids = read_checked(path)
    except FileNotFoundError:
        ids = {}
    except (OSError, ValueError) as error:
        log(f"{path}: cannot be read ({one_line(error)}), so the trackers begin new records", level=logging.WARNING)
        ids = {}
    opened: list[Tracker] = []
    found: dict[str, str] = {}
    for name, kind in _KINDS.items():
        if not getattr(config.logging, kind.field):
            continue
        before = ids.get(name)
        try:
            tracker, run_id = kind.open(_Request(config, output, before if isinstance(before, str) else None))
        except Exception as error:  # each package has errors of its own
            raise ConfigError(
                f"{kind.field}={getattr(config.logging, kind.field)}: {name} cannot be opened ({type(error).__name__}: "
                f"{one_line(error)}); check its settings and credentials, or leave {kind.field} out"
            ) from None
        opened.append(tracker)
        if run_id is not None:
            found[name] = run_id
    if found:
        write_checked(path, {**ids, **found})
    return opened
