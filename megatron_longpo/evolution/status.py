"""Where an evolution is: what is done, what it took, and what may be left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_longpo.evolution.gate import origin_of
from megatron_longpo.evolution.plan import Origin, Planner, Stage
from megatron_longpo.evolution.records import Record, read_record
from megatron_longpo.runtime.files import is_held
from megatron_longpo.runtime.tables import Table

_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class StageStatus:
    """What is known of a stage.

    Attributes:
        stage: the stage.
        record: its record; None if it has not begun.
        seconds_left: estimate of the time left, from the same stage of the latest round that has done it; None without one.
    """

    stage: Stage
    record: Record | None
    seconds_left: float | None

    @property
    def word(self) -> str:
        """waiting, running, interrupted, done or failed; of a stage whose tasks have begun, how many parts are done."""
        if self.record is None:
            return self._parts or "waiting"
        if self.record.state != "running":
            return self.record.state
        return "running" if is_held(self.stage.folder) else "interrupted"

    @property
    def _parts(self) -> str:
        """Of the tasks of a Slurm array, which have no record of the stage; empty: none has begun."""
        folder, count = self.stage.folder, self.stage.resources.array
        if count == 1 or not any(folder.glob("log-part-*.txt")):
            return ""
        done = sum((folder / f"part-{part}.json").exists() for part in range(count))
        return f"{done} of {count} parts"

    @property
    def process_hours(self) -> float:
        """Time spent, times processes."""
        return self.record.seconds * self.record.processes / _SECONDS_PER_HOUR if self.record else 0.0


def read_status(planner: Planner) -> list[StageStatus]:
    """Status of every stage of every round, in order."""
    found: list[StageStatus] = []
    took: dict[str, float] = {}
    origin = Origin(Path(str(planner.evolution.evolve.model)))
    for index, round_ in enumerate(planner.evolution.rounds):
        origin = origin_of(planner, index) or origin
        for stage in planner.stages(round_, origin):
            record = read_record(stage.folder)
            left = None
            if record is not None and record.state == "done":
                took[stage.name] = record.seconds
            elif stage.name in took:
                left = max(0.0, took[stage.name] - (record.seconds if record else 0.0))
            found.append(StageStatus(stage, record, left))
    return found


def print_status(statuses: Sequence[StageStatus], dollars_per_process_hour: float) -> None:
    """Print a table of the stages, and the sums."""
    rows = []
    for status in statuses:
        record = status.record
        rows.append(
            [
                status.stage.id,
                status.word,
                time_in_words(record.seconds) if record else "",
                time_in_words(status.seconds_left) if status.seconds_left is not None else "",
                str(record.attempts) if record else "",
                f"{status.process_hours:.2f}" if record else "",
            ]
        )
    hours = sum(status.process_hours for status in statuses)
    left = [status.seconds_left for status in statuses if status.seconds_left is not None]
    unknown = sum(s.seconds_left is None and (s.record is None or s.record.state != "done") for s in statuses)
    rows.append(
        [
            "sum",
            "",
            time_in_words(sum(s.record.seconds for s in statuses if s.record)),
            time_in_words(sum(left)),
            "",
            f"{hours:.2f}",
        ]
    )
    Table("Evolution", ("stage", "state", "spent", "left, about", "starts", "process hours"), rows).print()
    if unknown:
        print(f"{unknown} stages have no estimate: no earlier round has done the same")
    if dollars_per_process_hour:
        print(f"spent: ${hours * dollars_per_process_hour:,.2f}")


def time_in_words(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
