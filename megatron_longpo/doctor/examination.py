"""Runs one check after another on all ranks, each within its time: what hangs is a line of the report and not a hang.

Ranks tell each other what they found by the store, never by a collective. A thread watches the time. If a check is not over when
its time is, or if a rank fails in it while another waits for it, nothing can go on in these process groups: rank 0 reports who
was where, and all ranks end.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_longpo.doctor.findings import EXIT_STATUS, Line, Report, merged, ranges
from megatron_longpo.doctor.ranks import Ranks
from megatron_longpo.errors import one_line
from megatron_longpo.runtime.failure import describe
from megatron_longpo.runtime.heartbeat import silent_ranks

_POLL_SECONDS = 0.25
# A rank that failed may have made others wait; they are given this long to come to their end.
_GRACE_SECONDS = 5.0
# Other ranks hear from rank 0, which may be the one that hangs.
_BEYOND_SECONDS = 20.0
_LINGER_SECONDS = 1.5


@dataclass(frozen=True)
class Check:
    """Something to look at.

    Attributes:
        name: what it is.
        run: yields what this rank found; the argument tells where it is. Run on every rank.
        remedy: what to do if it hangs or fails as a whole.
        kernel: name of the kernel that it is about, which training refuses in that case; empty: none.
        optional: left out when the time of the whole examination is over.
        is_apart: whether each rank looks by itself, so that one that fails makes no other wait.
    """

    name: str
    run: Callable[[Ranks], Iterable[Line]]
    remedy: str = ""
    kernel: str = ""
    optional: bool = False
    is_apart: bool = False


class Examination:
    """Checks on all ranks.

    Args:
        ranks: the ranks.
        report: added to on rank 0.
        check_seconds: time of each check.
        on_change: called on rank 0 with the report after each check.
        on_end: called on every rank with the report's lines when the examination ends, early or not.
    """

    def __init__(
        self,
        ranks: Ranks,
        report: Report,
        *,
        check_seconds: float,
        on_change: Callable[[Report], None],
        on_end: Callable[[list[Line]], None],
    ) -> None:
        self.ranks, self.report, self._check_seconds = ranks, report, check_seconds
        self._on_change, self._on_end = on_change, on_end
        # Whether it ends early, and the process with it.
        self.is_given_up = False
        self._running: tuple[int, Check, float] | None = None
        self._number = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._watch_time, name="doctor watch", daemon=True)
        self._watch.start()

    def run(self, checks: Iterable[Check], *, seconds: float) -> None:
        """Run checks in order.

        Args:
            checks: the same on every rank.
            seconds: time after which optional checks are left out.
        """
        began, left_out = time.monotonic(), []
        for check in checks:
            self._number += 1
            # Clocks differ: that of rank 0 decides.
            if self.ranks.rank == 0:
                self.ranks.post(f"{self._number}/go", not check.optional or time.monotonic() - began < seconds)
            if not self.ranks.wait_for(f"{self._number}/go"):
                left_out.append(check.name)
                continue
            self._run(check)
        if left_out and self.ranks.rank == 0:
            why = f"the time of {seconds:.0f} s was over before {', '.join(left_out)}; raise --time-limit"
            self.report.lines.append(Line(f"{len(left_out)} more", "skipped", why))

    def _run(self, check: Check) -> None:
        ranks, number = self.ranks, self._number
        ranks.at(check.name)
        clock = time.monotonic()
        with self._lock:
            self._running = (number, check, clock)
        lines: list[Line] = []
        failure: str | None = None
        try:
            for line in _timed(check.run(ranks)):
                lines.append(line)
        except Exception as error:  # whatever a broken library raises is a finding
            failure = one_line(describe(error))
            seconds = time.monotonic() - clock
            lines.append(Line(check.name, "fail", failure, check.remedy, check.kernel, seconds))
        ranks.post(
            f"{number}/found/{ranks.rank}", {"lines": [dataclasses.asdict(x) for x in lines], "failure": failure}
        )
        ranks.at(f"after {check.name}")
        if ranks.rank == 0:
            found = [ranks.wait_for(f"{number}/found/{rank}") for rank in range(ranks.world_size)]
            with self._lock:
                self._running = None
            self.report.lines += merged([_lines_in(each) for each in found])
            failed = [rank for rank, each in enumerate(found) if each["failure"]]
            if 0 < len(failed) < ranks.world_size and not check.is_apart:
                # The others may have waited for them in a collective that some of them never began.
                self._give_up()
            self._on_change(self.report)
        else:
            with self._lock:
                self._running = None

    def close(self) -> list[Line]:
        """End the examination; returns the report's lines on every rank."""
        self._closed.set()
        if self.ranks.rank == 0:
            self.ranks.post("end", [dataclasses.asdict(line) for line in self.report.lines])
        lines = [Line.of(row) for row in self.ranks.wait_for("end")]
        self._on_end(lines)
        return lines

    # ---------------------------------------------------------------------------------------------
    # The watch
    # ---------------------------------------------------------------------------------------------

    def _watch_time(self) -> None:
        """Ends the process where the main thread cannot."""
        ranks = self.ranks.connect()
        failed_since: float | None = None
        while not self._closed.wait(_POLL_SECONDS):
            with self._lock:
                running = self._running
            if ranks.rank != 0:
                ended = ranks.peek("given up")
                if ended is not None:
                    self._end([Line.of(row) for row in ended])
                if running is not None and time.monotonic() - running[2] > self._check_seconds + _BEYOND_SECONDS:
                    # Rank 0 does not report any more.
                    os._exit(EXIT_STATUS["fail"])
                continue
            if running is None:
                failed_since = None
                continue
            number, check, began = running
            found = [ranks.peek(f"{number}/found/{rank}") for rank in range(ranks.world_size)]
            now = time.monotonic()
            has_failed = not check.is_apart and any(each and each["failure"] for each in found)
            failed_since = (failed_since or now) if has_failed else None
            if now - began > self._check_seconds or (failed_since is not None and now - failed_since > _GRACE_SECONDS):
                with self._lock:
                    if self._running is not running:
                        continue
                self._report_hang(ranks, check, found, now - began)

    def _report_hang(self, ranks: Ranks, check: Check, found: list[Any], seconds: float) -> None:
        self.report.lines += merged([_lines_in(each) if each else [] for each in found])
        failed = [rank for rank, each in enumerate(found) if each and each["failure"]]
        missing = [rank for rank, each in enumerate(found) if not each]
        if missing:
            places: dict[str, list[int]] = {}
            for rank in missing:
                places.setdefault(ranks.places()[rank], []).append(rank)
            where = "; ".join(f"rank {ranges(there)} in {place}" for place, there in places.items())
            silent = [rank for rank in silent_ranks() if rank in missing]
            if silent:
                where += f"; no sign of life from rank {ranges(silent)}"
            why = f"while rank {ranges(failed)} failed" if failed else f"within {self._check_seconds:.0f} s"
            detail = f"hangs: no answer {why} from {where}"
            line = Line(check.name, "fail", detail, check.remedy, check.kernel, seconds)
            self.report.lines.append(dataclasses.replace(line, ranks=tuple(missing)))
        self._give_up()

    def _give_up(self) -> None:
        """On rank 0: end all ranks, since their process groups cannot be used any more."""
        self.report.lines.append(
            Line("everything after", "skipped", "the process groups cannot be used after that; mend it and run again")
        )
        self._on_change(self.report)
        self.ranks.connect().post("given up", [dataclasses.asdict(line) for line in self.report.lines])
        self._end(self.report.lines)

    def _end(self, lines: list[Line]) -> None:
        self.is_given_up = True
        try:
            self._on_end(lines)
        finally:
            # The others read why, from a store that may be this process's.
            time.sleep(_LINGER_SECONDS)
            os._exit(EXIT_STATUS["fail"])


def _lines_in(found: dict[str, Any]) -> list[Line]:
    return [Line.of(row) for row in found["lines"]]


def _timed(lines: Iterable[Line]) -> Iterator[Line]:
    """Lines with the time that each took, where they do not say it themselves."""
    clock = time.monotonic()
    for line in lines:
        now = time.monotonic()
        yield line if line.seconds else dataclasses.replace(line, seconds=now - clock)
        clock = now
