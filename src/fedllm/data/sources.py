"""A source named in party.yaml -> its raw records: one file, a folder of files, a saved data set, or a hub id."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from fedllm.data.files import READERS, Record, read_file, table_records
from fedllm.data.settings import local_path
from fedllm.errors import DataError, nearest

_SUFFIXES = ", ".join(READERS)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
_SPLIT_WORD = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval)(?:[-_.]|$)")
_SPLIT_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}
_ROWS_AT_ONCE = 1000


def read_records(source: str, *, base_dir: Path, split: str | None) -> Iterator[Record]:
    """Yield the raw records of a source, in a fixed order.

    Args:
        source: File, folder, or hub id.
        base_dir: Where relative paths start.
        split: Name of the split; None where the source has only one.

    Raises:
        DataError: `DATA_NOT_FOUND`, or `DATA_BROKEN_LINE` for a file that cannot be read at all.
    """
    path = local_path(source, base_dir)
    if _is(path, "file"):
        return _file_records(path, split)
    if _is(path, "folder"):
        return _folder_records(path, split)
    if _HUB_ID.fullmatch(source) and not _looks_like_a_path(source, base_dir):
        return _hub_records(source, split)
    raise _no_such_path(path)


def _is(path: Path, what: str) -> bool:
    try:
        return path.is_file() if what == "file" else path.is_dir()
    except (OSError, ValueError):
        return False


def _looks_like_a_path(source: str, base_dir: Path) -> bool:
    first = source.partition("/")[0]
    return Path(source).suffix.lower() in READERS or _is(base_dir / first, "folder")


def _no_such_path(path: Path) -> DataError:
    fix = "check the path; a hub id has the form org/name"
    if _is(path.parent, "folder"):
        hint = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
        fix = hint if hint.startswith("did you mean") else fix
    return DataError("DATA_NOT_FOUND", "there is no such file or folder", where=str(path), fix=fix)


def _file_records(path: Path, split: str | None) -> Iterator[Record]:
    if path.suffix.lower() not in READERS:
        raise DataError(
            "DATA_FORMAT_UNKNOWN",
            f"suffix {path.suffix!r} is none of {_SUFFIXES}",
            where=str(path),
            fix="convert the file, or rename it if it is one of these",
        )
    if split not in (None, "train"):
        raise DataError(
            "DATA_NOT_FOUND",
            f"a single file has no split {split!r}",
            where=str(path),
            fix="leave the split out, or name the file that holds it",
        )
    return read_file(path)


def _folder_records(folder: Path, split: str | None) -> Iterator[Record]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_records(folder, split)
    files = _files_of_split(folder, split)
    return chain.from_iterable(read_file(path) for path in files)


def _files_of_split(folder: Path, split: str | None) -> list[Path]:
    """Return a folder's data files of a split: by subfolder or by a word in the name; the rest is `train`."""
    below = folder if split is None or not (folder / split).is_dir() else folder / split
    files = sorted(p for p in below.iterdir() if p.is_file() and p.suffix.lower() in READERS)
    if not files:
        raise DataError(
            "DATA_NOT_FOUND", f"no data file in the folder ({_SUFFIXES})", where=str(below), fix="put the files there"
        )
    if split is None or below != folder:
        return files
    wanted = _SPLIT_ALIASES.get(split, split)
    chosen = [path for path in files if _split_of(path.stem) == wanted]
    if not chosen:
        found = {_split_of(path.stem) for path in files}
        raise _no_such_split(split, found, str(folder))
    return chosen


def _split_of(stem: str) -> str:
    word = _SPLIT_WORD.search(stem.lower())
    return _SPLIT_ALIASES.get(word[1], word[1]) if word else "train"


def _no_such_split(split: str | None, found: set[str], where: str) -> DataError:
    if split is None:
        what = f"there are several splits: {', '.join(sorted(found))}"
        return DataError("DATA_NOT_FOUND", what, where=where, fix="name one of them")
    return DataError("DATA_NOT_FOUND", f"there is no split {split!r}", where=where, fix=nearest(split, found))


def _saved_records(folder: Path, split: str | None) -> Iterator[Record]:
    import pyarrow  # type: ignore[import-untyped]
    from datasets import load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(
            "DATA_BROKEN_LINE",
            f"the saved data set cannot be loaded ({type(error).__name__})",
            where=str(folder),
            fix="save it again by `save_to_disk`",
        ) from None
    return _dataset_records(loaded, split, str(folder))


def _hub_records(source: str, split: str | None) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(source)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            "DATA_NOT_FOUND",
            f"no file or folder of this name is here, and the hub did not give it ({type(error).__name__})",
            where=source,
            fix="check the spelling and the network; or save the data set here by `save_to_disk` and name the folder",
        ) from None
    return _dataset_records(loaded, split, source)


def _dataset_records(loaded: Any, split: str | None, where: str) -> Iterator[Record]:
    """Yield the rows of a `Dataset`, or of one split of a `DatasetDict`, without decoding images or audio."""
    from datasets import DatasetDict

    if isinstance(loaded, DatasetDict):
        names = {str(name) for name in loaded}
        split = next(iter(names)) if split is None and len(names) == 1 else split
        if split not in names:
            raise _no_such_split(split, names, where)
        loaded = loaded[split]
        where = f"{where} ({split})"
    elif split not in (None, "train"):
        raise DataError("DATA_NOT_FOUND", f"there is no split {split!r}", where=where, fix="leave the split out")
    tables = loaded.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
    return table_records(tables, where)
