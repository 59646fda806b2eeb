"""Nothing that is loaded runs code: the loaders themselves, and no call in the tree without its safe argument."""

from __future__ import annotations

import ast
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import msc_utils

from megatron_longpo.runtime import platform, unpickling
from tests.support.launch import ROOT

assert platform.CURRENT is not None  # importing it replaces the loaders

# Where pickles may be named at all, each with its reason in SECURITY.md.
_MAY_PICKLE = {"megatron_longpo/runtime/unpickling.py", "megatron_longpo/checkpoint/huggingface.py"}


class _Hostile:
    """Pickled, it makes a folder when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def _saved(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def test_an_index_is_read_as_before(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "checkpoint", {"a": torch.arange(6.0), "step": 3, "names": ["x", "y"]})
    found = {"a": torch.zeros(6), "step": 0, "names": []}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    assert torch.equal(found["a"], torch.arange(6.0)) and (found["step"], found["names"]) == (3, ["x", "y"])


def test_an_index_that_calls_something_is_refused(tmp_path: Path) -> None:
    folder, marker = _saved(tmp_path / "checkpoint", {"a": torch.zeros(2)}), tmp_path / "ran"
    (folder / ".metadata").write_bytes(pickle.dumps(_Hostile(marker)))
    with pytest.raises((pickle.UnpicklingError, dcp.api.CheckpointException), match=r"posix\.mkdir"):
        dcp.load({"a": torch.zeros(2)}, checkpoint_id=folder, no_dist=True)
    assert not marker.exists()


@pytest.mark.parametrize("forced", [False, True])
def test_an_entry_that_calls_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    """Also where the environment asks torch for the unsafe loader."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, marker = _saved(tmp_path / "checkpoint", {"entry": {"step": 1}}), tmp_path / "ran"
    marker_state = {"entry": {"step": _Hostile(marker)}}
    dcp.save(marker_state, checkpoint_id=folder, no_dist=True)
    with pytest.raises((pickle.UnpicklingError, dcp.api.CheckpointException)):
        dcp.load({"entry": {"step": 1}}, checkpoint_id=folder, no_dist=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "os.system", "torch.load", "pathlib.os", "torch.serialization.load"]
)
def test_only_classes_of_an_index_are_known(name: str) -> None:
    module, attribute = name.rsplit(".", 1)
    payload = b"c" + module.encode() + b"\n" + attribute.encode() + b"\n."
    with pytest.raises(pickle.UnpicklingError, match="never does"):
        unpickling._SafePickle().load(io.BytesIO(payload))


def _calls() -> Iterator[tuple[str, int, str, set[str], ast.Call]]:
    """(file, line, name of what is called, names of keywords, call) of all calls in the code that is shipped."""
    for folder in ("megatron_longpo", "tools", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield relative, node.lineno, ast.unparse(node.func), {k.arg or "**" for k in node.keywords}, node


def test_every_loader_is_called_with_its_safe_argument() -> None:
    wrong = []
    for path, line, name, keywords, call in _calls():
        values = {k.arg: ast.unparse(k.value) for k in call.keywords}
        at = f"{path}:{line} {name}"
        if name.endswith(("torch.load",)) and values.get("weights_only") != "True" and path not in _MAY_PICKLE:
            wrong.append(f"{at} without weights_only=True")
        if name in ("np.load", "numpy.load") and values.get("allow_pickle") != "False":
            wrong.append(f"{at} without allow_pickle=False")
        if name.endswith((".from_pretrained", ".from_config")) and "trust_remote_code" not in keywords:
            wrong.append(f"{at} without trust_remote_code")
        if name in ("yaml.load", "yaml.full_load", "yaml.unsafe_load", "eval", "exec", "os.system", "marshal.loads"):
            wrong.append(f"{at} is not allowed")
        if "pickle" in name and path not in _MAY_PICKLE and name.endswith(("load", "loads", "Unpickler")):
            wrong.append(f"{at} is not allowed")
    assert not wrong, "\n".join(wrong)


def test_the_check_finds_what_it_looks_for() -> None:
    """It would be of no use if the tree had none of these calls."""
    names = {name for _, _, name, _, _ in _calls()}
    assert {"torch.load", "np.load"} <= names
    assert any(name.endswith(".from_pretrained") for name in names)


def test_readers_of_other_packages_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msc_utils, "msc", object())  # as where multi-storage-client is installed
    assert not msc_utils.MultiStorageClientFeature.is_enabled()
    msc_utils.MultiStorageClientFeature.enable()
    assert msc_utils.MultiStorageClientFeature.is_enabled()
    unpickling.load_checkpoints_safely()
    assert not msc_utils.MultiStorageClientFeature.is_enabled()
