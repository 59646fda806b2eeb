"""Which files of a folder are its data: splits, caches, other versions, and what else lies beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_longpo.errors import DataError
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.reading import read_json

ALL_SPLITS = "all"
# Words for splits, as the package datasets knows them.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
# What datasets writes beside saved data.
_DATASETS_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")
# What the tools of this package write beside their output.
_OWN_FOLDERS = (".work", ".report", ".partial", ".reference")
_OWN_FILES = (".rejects.jsonl",)
# Files that a message names.
_NAMED = 5


def is_hidden(path: Path, root: Path) -> bool:
    """Whether a path is hidden, or in a hidden folder, below a folder."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def is_beside_data(path: Path, root: Path) -> bool:
    """Whether a file below a folder is hidden, a cache of datasets, or something that our tools wrote beside data."""
    folders = path.relative_to(root).parts[:-1]
    return (
        is_hidden(path, root)
        or path.name in _DATASETS_FILES
        or path.name.endswith(_OWN_FILES)
        or any(folder.endswith(_OWN_FOLDERS) for folder in folders)
        or (path.suffix == ".arrow" and path.name.startswith(("cache-", "indices-", "tmp")))
    )


def split_of(path: Path, root: Path) -> str:
    """Name of the split that a file is of, by its own name or a folder's; empty if it says none."""
    relative = path.relative_to(root)
    stem = relative.name.split(".")[0] if "." in relative.name[1:] else relative.name
    shard = _SHARD.fullmatch(stem)
    if shard and (words := _SPLIT_WORD.findall(shard[1])):
        # A data set may have several splits for training: train_prefs, train_sft.
        return shard[1] if "_" in shard[1] and shard[1].lower().startswith(words[0].lower()) else words[-1].lower()
    for part in (relative.name, *reversed(relative.parts[:-1])):
        if words := _SPLIT_WORD.findall(part):
            return str(words[-1]).lower()
    return ""


def saved_datasets(folder: Path, flag: str, split: str | None) -> list[Path] | None:
    """Arrow files of a folder that datasets saved (``save_to_disk``), in order; None if it is no such folder.

    Args:
        folder: the folder.
        flag: beginning of an error message.
        split: name of the split to read, or None.

    Raises:
        DataError: there are several splits and none is chosen, or files are missing.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _names(folder / "dataset_dict.json", "splits", flag)
        files: list[Path] = []
        for name in chosen_splits(names, flag, split):
            found = saved_datasets(folder / name, flag, None)
            if found is None:
                raise DataError(
                    f"{flag}: has the split {name} in dataset_dict.json and no {name}/state.json; copy it again"
                )
            files += found
        return files
    if (folder / "state.json").is_file() and next(folder.glob("*.arrow"), None) is not None:
        return _files_of_state(folder, flag)
    return None


def _files_of_state(folder: Path, flag: str) -> list[Path]:
    """The files that a saved data set consists of. Caches lie in the same folder."""
    files = [folder / name for name in _names(folder / "state.json", "_data_files", flag)]
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise DataError(f"{flag}: lacks {_some(missing)}, which {folder.name}/state.json names; copy it again")
    return files


def _names(path: Path, key: str, flag: str) -> list[str]:
    """Names in a file of datasets: texts, or objects with ``filename``; each is a name in the same folder."""
    try:
        values = read_json(path)[key]
        names = [value["filename"] if isinstance(value, dict) else value for value in values]
        if not all(isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..") for name in names):
            raise ValueError("a name is not that of a file in the same folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{flag}: {path.name} cannot be read ({error!r}); copy the folder again") from None
    return names


def chosen_splits(names: Sequence[str], flag: str, split: str | None) -> list[str]:
    """The splits to read.

    Raises:
        DataError: there are several and none is chosen, or there is none of that name.
    """
    if split == ALL_SPLITS:
        return list(names)
    if split is None:
        if len(names) > 1:
            raise DataError(
                f"{flag}: has the splits {', '.join(name or '(none)' for name in names)}; choose one with --split NAME, or "
                f"--split {ALL_SPLITS}"
            )
        return list(names)
    exact = [name for name in names if name == split]
    found = exact or [name for name in names if _SPLITS.get(name) == _SPLITS.get(split, split)]
    if len(found) != 1:
        raise DataError(
            f"{flag}: has no split {split}; choose one of {', '.join(name for name in names if name) or 'none'}"
        )
    return found


def files_of_split(folder: Path, files: Sequence[Path], flag: str, split: str | None) -> list[Path]:
    """The files of one split among files of a folder.

    Args:
        folder: the folder.
        files: its data files.
        flag: beginning of an error message.
        split: name of the split to read, or None.

    Raises:
        DataError: the files are of several splits and none is chosen, or none is of the split.
    """
    named = {path: split_of(path, folder) for path in files}
    if split is None and not any(named.values()):
        return list(files)
    chosen = chosen_splits(sorted(set(named.values())), flag, split)
    return [path for path in files if named[path] in chosen]


def refuse_versions(folder: Path, files: Sequence[Path], flag: str) -> None:
    """Raise DataError for files that seem to be the same data twice: packed and unpacked, or of the same name in several folders,
    or some in the folder and others in folders below it."""
    names = Counter(path.name for path in files)
    unpacked = Counter(path.with_name(path.name.removesuffix(".gz").removesuffix(".zst")) for path in files)
    above = [path for path in files if path.parent == folder]
    equal = [
        path
        for path in files
        if names[path.name] > 1 or unpacked[path.with_name(path.name.removesuffix(".gz").removesuffix(".zst"))] > 1
    ]
    if not equal and 0 < len(above) < len(files):
        equal = list(files)
    if equal:
        raise DataError(
            f"{flag}: holds what may be the same data twice, or other versions of it "
            f"({_some(str(path.relative_to(folder)) for path in equal)}); name the files or folders that you mean"
        )


def log_left_out(folder: Path, files: Sequence[Path]) -> None:
    """Log files that are left out."""
    if files:
        log(f"{folder}: {len(files)} other file(s) are left out ({_some(str(p.relative_to(folder)) for p in files)})")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_NAMED]) + (", ..." if len(listed) > _NAMED else "")
