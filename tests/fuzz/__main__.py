"""Fuzz all readers for a time; resumable.

    python -m tests.fuzz --folder FOLDER --seconds 3600 [--readers a,b]
    python -m tests.fuzz --folder FOLDER --check [--readers a,b]

The folder has ``state.json`` (inputs, findings, slowest and largest per reader) and ``findings/``: of each kind of finding the
first inputs, with the traceback. Started again with the same folder, it goes on after the last input. What was found is mended,
and its input is moved to ``tests/fuzz/kept/READER/NAME/``, where ``--check`` runs it: all kept inputs and a few new ones.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import OUTSIDE
from tests.fuzz.readers import Reader, readers
from tests.fuzz.running import Input, Outcome, make_input, make_valid, run_inputs

_KEPT_PER_KIND = 2
_ROUND_SECONDS = 6.0
_MADE = 300
_CHECKED = 6
_KEPT = Path(__file__).parent / "kept"


def import_everything() -> None:
    """Pay for the imports once, before any child is forked."""
    import lm_eval.tasks  # noqa: F401

    import tests.support.preloaded  # noqa: F401

    gc.freeze()


def values(seed: int, count: int = _MADE) -> list[Any]:
    """Plain values and texts, made by hypothesis."""
    import hypothesis
    from hypothesis import strategies as st

    found: list[Any] = []
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    plain = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=6),
        max_leaves=12,
    )

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(plain | st.text(max_size=200))
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def _empty() -> dict[str, Any]:
    return {
        "inputs": 0,
        "seconds": 0.0,
        "kinds": {},
        "findings": {},
        "slowest": 0.0,
        "slowest_input": None,
        "largest": 0,
        "largest_input": None,
    }


def note(state: dict[str, Any], folder: Path, reader: Reader, changed: Input, outcome: Outcome) -> None:
    """Count an outcome; of the first findings of a kind, keep the files and print a line."""
    state["inputs"] = max(state["inputs"], outcome.number + 1)
    state["kinds"][outcome.kind] = state["kinds"].get(outcome.kind, 0) + 1
    if outcome.seconds > state["slowest"]:
        state["slowest"], state["slowest_input"] = round(outcome.seconds, 3), outcome.number
    if outcome.bytes > state["largest"]:
        state["largest"], state["largest_input"] = outcome.bytes, outcome.number
    if not outcome.is_finding:
        return
    where = f"{outcome.kind}: {outcome.where}"
    state["findings"][where] = state["findings"].get(where, 0) + 1
    if state["findings"][where] > _KEPT_PER_KIND:
        return
    print(f"{reader.name} {outcome.number}: {where}", flush=True)
    kept = folder / "findings" / reader.name / f"{hashlib.sha256(where.encode()).hexdigest()[:8]}-{outcome.number}"
    for name, content in changed.files.items():
        path = kept / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (kept / "finding.txt").write_text(
        f"{where}\nmended: {changed.is_mended}\n{outcome.seconds:.1f} s, {outcome.bytes / 1e6:.0f} MB\n{outcome.detail}\n",
        errors="replace",
    )


def kept_inputs(reader: Reader) -> list[tuple[str, Input]]:
    """Inputs that broke the reader once."""
    found = []
    for folder in sorted((_KEPT / reader.name).glob("*")):
        files = {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }
        # The name says how the input was made.
        found.append((folder.name, Input(files, "damage" in folder.name, "mended" in folder.name)))
    return found


def check(chosen: dict[str, Reader], folder: Path) -> None:
    """Run all kept inputs and a few new ones of each reader; write what became of them to outcomes.json."""
    made, outcomes = values(0, 30), {}
    for reader in chosen.values():
        valid = make_valid(reader, folder)
        count = _CHECKED if reader.batch > 1 else 1
        inputs = [*kept_inputs(reader), *((str(n), make_input(reader, valid, n, made)) for n in range(count))]
        found = outcomes[reader.name] = {}
        for outcome in run_inputs(reader, folder, list(enumerate(changed for _, changed in inputs))):
            what = f"finding: {outcome.kind} {outcome.where} {outcome.detail}" if outcome.is_finding else outcome.kind
            found[inputs[outcome.number][0]] = what
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="state, findings and work")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--check", action="store_true", help="run the kept inputs and a few new ones, and end")
    parser.add_argument("--readers", default="", help="names, separated by commas (default: all)")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    Path(OUTSIDE).write_text("a secret\n")
    os.environ.update(OMP_NUM_THREADS="1", JE_ARROW_MALLOC_CONF="background_thread:false", HF_HUB_OFFLINE="1")
    import_everything()
    chosen = {n: r for n, r in readers().items() if not options.readers or n in options.readers.split(",")}
    if options.check:
        check(chosen, folder)
        return
    path = folder / "state.json"
    state: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"seconds": 0.0, "rounds": 0, "readers": {}}
    )
    for reader in chosen.values():
        make_valid(reader, folder)
        state["readers"].setdefault(reader.name, _empty())
    began, before = time.monotonic(), state["seconds"]
    while time.monotonic() - began < options.seconds:
        made = values(state["rounds"])
        for reader in chosen.values():
            own = state["readers"][reader.name]
            until = time.monotonic() + _ROUND_SECONDS * reader.share
            started = time.monotonic()
            while time.monotonic() < until:
                numbers = range(own["inputs"], own["inputs"] + (reader.batch if reader.batch > 1 else 4))
                inputs = [(n, make_input(reader, folder / reader.name / "valid", n, made)) for n in numbers]
                for outcome in run_inputs(reader, folder, inputs):
                    note(own, folder, reader, dict(inputs)[outcome.number], outcome)
            own["seconds"] = round(own["seconds"] + time.monotonic() - started, 1)
            state["seconds"] = round(before + time.monotonic() - began, 1)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(state, indent=1))
            os.replace(temporary, path)
        state["rounds"] += 1
        print(
            f"round {state['rounds']}: {state['seconds']:.0f} s, {sum(r['inputs'] for r in state['readers'].values())} inputs",
            flush=True,
        )


if __name__ == "__main__":
    main()
