"""Training in which the environment variable MEDDLE says what happens after step MEDDLE_STEP (2), on the rank MEDDLE_RANK.

With MEDDLE_MORE, a list in JSON of objects with what, step and rank, more happens later. With MEDDLE_DATA, an object in JSON,
what it says happens on all ranks in every step that it names, whenever that is computed: as if it were the samples' fault.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_longpo.cli import run
from megatron_longpo.runtime import process_groups
from megatron_longpo.training import trainer
from megatron_longpo.training.optimization import inner_optimizers
from megatron_longpo.training.trainer import Trainer

_original = Trainer.train_step
_OF_DATA: dict[str, str] = json.loads(os.environ.get("MEDDLE_DATA", "{}"))
_MORE: list[dict[str, Any]] = json.loads(os.environ.get("MEDDLE_MORE", "[]"))


def _poison_weight(run: Trainer, value: float = float("nan")) -> None:
    next(run.chunks[0].parameters()).data.view(-1)[3] = value


def _poison_state(run: Trainer, key: str) -> None:
    state = next(iter(inner_optimizers(run.optimizer)[0].state.values()))
    state[key].view(-1)[0] = float("inf")


def _unchecked(action: Callable[[Trainer], None]) -> Callable[[Trainer], None]:
    """As a release without the check would have saved it."""

    def act(run: Trainer) -> None:
        trainer.first_not_finite = lambda *_: None  # type: ignore[assignment]
        action(run)

    return act


def _remove_output(run: Trainer) -> None:
    assert run.plan.output is not None
    shutil.rmtree(run.plan.output)


def _replace_output(run: Trainer) -> None:
    _remove_output(run)
    assert run.plan.output is not None
    run.plan.output.mkdir()


def _limit_files(_: Trainer) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def _signal_launcher(_: Trainer) -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    # Until it has passed the signal on.
    time.sleep(2)


def _spoil_loss(run: Trainer, value: float) -> None:
    """In the next step the first sample of this rank has another loss."""
    original = run.session.runner.forward_backward

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        run.session.runner.forward_backward = original  # type: ignore[method-assign]
        found = original(*args, **kwargs)
        if found:
            found[0].values["loss"][0] = value
        return found

    run.session.runner.forward_backward = spoiled  # type: ignore[method-assign]


def _spoil_gradient(run: Trainer) -> None:
    """In the next step this rank's gradient is infinite, before it is reduced over the ranks."""
    config = run.chunks[0].config
    original = config.finalize_model_grads_func

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        config.finalize_model_grads_func = original
        next(run.chunks[0].parameters()).main_grad.view(-1)[3] = float("inf")
        return original(*args, **kwargs)

    config.finalize_model_grads_func = spoiled


def _limit_files_for_a_while(run: Trainer) -> None:
    """Until two steps later no file may grow large, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    save, last = run.save, run.step + 3

    def limited(**flags: Any) -> None:
        if run.step == last:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        save(**flags)

    run.save = limited  # type: ignore[method-assign]


def _fail_to_complete(_: Trainer) -> None:
    """Each of the files that rank 0 writes of a checkpoint fails once: common.pt, then .metadata, then metadata.json."""
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    from megatron_longpo.checkpoint import saving

    places: list[tuple[Any, str]] = [
        *((TorchCommonSaveStrategy, "save_common"), (saving.FileSystemWriter, "finish"), (saving, "save_config"))
    ]
    for place, name in places:
        setattr(place, name, _failing_once(getattr(place, name)))


def _failing_once(original: Callable[..., Any]) -> Callable[..., Any]:
    has_failed = False

    def act(*args: Any, **kwargs: Any) -> Any:
        nonlocal has_failed
        if not has_failed:
            has_failed = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), original.__name__)
        return original(*args, **kwargs)

    return act


def _kill_in_save(run: Trainer) -> None:
    """Some milliseconds after the next save began."""
    original = run.checkpointer._save

    def save(*args: Any) -> None:
        killed = threading.Timer(
            float(os.environ.get("MEDDLE_DELAY", "0.01")), lambda: os.kill(os.getpid(), signal.SIGKILL)
        )
        killed.start()
        original(*args)

    run.checkpointer._save = save  # type: ignore[method-assign]


def _wait_and_stop(_: Trainer) -> None:
    """Until the file MEDDLE_GO is there; another one says that this waits."""
    open(os.environ["MEDDLE_GO"] + ".waiting", "w").close()
    while not os.path.exists(os.environ["MEDDLE_GO"]):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


def _fail_plot(_: Trainer) -> None:
    from megatron_longpo.training import metrics

    def fail(*_: Any) -> None:
        raise TypeError("unsupported operand")

    metrics.draw_curves = fail


MEDDLES: dict[str, Callable[[Trainer], None]] = {
    "nothing": lambda _: None,
    "nan weight": _poison_weight,
    "infinite weight": lambda run: _poison_weight(run, float("inf")),
    "state": lambda run: _poison_state(run, "exp_avg_sq"),
    "saved nan weight": _unchecked(_poison_weight),
    "saved state": _unchecked(lambda run: _poison_state(run, "exp_avg_sq")),
    "remove": _remove_output,
    "replace": _replace_output,
    "limit": _limit_files,
    "limit for a while": _limit_files_for_a_while,
    "complete": _fail_to_complete,
    "curves": _fail_plot,
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "kill in save": _kill_in_save,
    "kill the launcher": lambda _: os.kill(os.getppid(), signal.SIGKILL),
    "wait": _wait_and_stop,
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "nan loss": lambda run: _spoil_loss(run, float("nan")),
    "high loss": lambda run: _spoil_loss(run, 1e6),
    "gradient": _spoil_gradient,
    "SIGTERM": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1": lambda _: os.kill(os.getpid(), signal.SIGUSR1),
    "SIGTERM to the launcher": _signal_launcher,
    "memory": lambda _: torch.empty(2**60),  # type: ignore[dict-item, return-value]
    "recursion": lambda _: (_ for _ in ()).throw(RecursionError("maximum recursion depth exceeded")),  # type: ignore[dict-item, return-value]
}


def _step(self: Trainer) -> dict[str, Any]:
    if (what := _OF_DATA.get(str(self.step + 1))) is not None:
        MEDDLES[what](self)
    record = _original(self)
    if "MEDDLE_LEDGER" in os.environ and os.environ["RANK"] == "0":
        with open(os.environ["MEDDLE_LEDGER"], "a", encoding="utf-8") as ledger:
            ledger.write(json.dumps([self.step + 1, self._numbers]) + "\n")
    is_time = self.step == int(os.environ.get("MEDDLE_STEP", "2")) - 1
    if is_time and os.environ["RANK"] == os.environ.get("MEDDLE_RANK", "0") and _is_first():
        MEDDLES[os.environ["MEDDLE"]](self)
    for later in _MORE:
        if self.step == later["step"] - 1 and os.environ["RANK"] == str(later["rank"]):
            MEDDLES[later["what"]](self)
    return record


def _is_first() -> bool:
    """Whether it has not happened yet, where it is to happen once: the file MEDDLE_ONCE says so."""
    once = os.environ.get("MEDDLE_ONCE")
    if once is None:
        return True
    if os.path.exists(once):
        return False
    open(once, "w").close()
    return True


def _wait_for_seconds(seconds: float) -> None:
    """Collectives time out after seconds; the configuration knows only minutes."""
    start = process_groups.start_processes
    process_groups.start_processes = lambda _minutes: start(seconds / 60)  # type: ignore[assignment, arg-type]


if __name__ == "__main__":
    if "MEDDLE_SECONDS" in os.environ:
        _wait_for_seconds(float(os.environ["MEDDLE_SECONDS"]))
    Trainer.train_step = _step  # type: ignore[method-assign]
    run("train", prog="megatron_longpo.train")
