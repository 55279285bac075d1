"""Data files -> raw records, each with its place; a record that cannot be read carries the reason instead.

The readers go on after a broken record, so that one pass finds every broken line. Reasons never quote content.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.data.formats import BadRecord
from fedllm.errors import DataError

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

MAX_LINE_BYTES = 16 * 2**20
MAX_JSON_BYTES = 2**30
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Place:
    """Where a record stands: file, number from 1, and whether the number counts lines or rows."""

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"


@dataclass(frozen=True)
class Record:
    """One record of a file, or the reason why it cannot be read. The repr shows no content."""

    place: Place
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    problem: str = ""


def read_file(path: Path) -> Iterator[Record]:
    """Yield the records of a data file.

    Args:
        path: A file whose suffix is a key of `READERS`.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    try:
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(
            "DATA_NOT_FOUND", f"the file cannot be opened: {reason}", where=str(path), fix="check its permissions"
        ) from None


def table_records(tables: Iterator[pyarrow.Table | pyarrow.RecordBatch], file: str) -> Iterator[Record]:
    """Yield the rows of Arrow tables as records.

    Args:
        tables: The tables, in order.
        file: What to call their source in messages.
    """
    number = 0
    for table in tables:
        for fields in table.to_pylist():
            number += 1
            yield Record(Place(file, number, "row"), fields)


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, raw in _lines(path):
        place = Place(str(path), number)
        try:
            yield Record(place, _as_object(_parse(_decode(raw))))
        except BadRecord as bad:
            yield Record(place, problem=str(bad))


def _read_json(path: Path) -> Iterator[Record]:
    """Read a list of objects; a file of one object a line is read as JSON Lines, whatever its suffix."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise _unreadable(path, f"the file is larger than {MAX_JSON_BYTES >> 20} MiB", "write it as JSON Lines")
    raw = path.read_bytes()
    _refuse_utf16(path, raw[:2])
    try:
        text = _decode(raw)
    except BadRecord as bad:
        raise _unreadable(path, str(bad), "save it as UTF-8") from None
    if text.lstrip().startswith("["):
        yield from _json_list(text, str(path))
    elif _first_line_is_object(text):
        yield from _read_jsonl(path)
    elif text.strip():
        yield _whole_document(text, str(path))


def _first_line_is_object(text: str) -> bool:
    try:
        return isinstance(_parse(text.lstrip().partition("\n")[0]), dict)
    except BadRecord:
        return False


def _whole_document(text: str, file: str) -> Record:
    try:
        return Record(Place(file, 1), _as_object(_parse(text)))
    except BadRecord as bad:
        return Record(Place(file, 1), problem=str(bad))


def _json_list(text: str, file: str) -> Iterator[Record]:
    """Yield the items of a JSON list. After an item that is not JSON the next one's start is unknown: stop there."""
    at, counted, line = text.index("[") + 1, 0, 1
    while True:
        at = _skip_space(text, at)
        line += text.count("\n", counted, at)
        place, counted = Place(file, line), at
        if text.startswith("]", at) or at >= len(text):
            break
        try:
            item, at = _parse_at(text, at)
        except BadRecord as bad:
            yield Record(place, problem=str(bad))
            return
        yield _object_record(place, item)
        at = _skip_space(text, at)
        if text.startswith(",", at):
            at += 1
        elif not text.startswith("]", at):
            break
    if not text.startswith("]", at) or text[at + 1 :].strip():
        yield Record(place, problem="not JSON: the list is not closed properly (cut off?)")


def _object_record(place: Place, item: Any) -> Record:
    try:
        return Record(place, _as_object(item))
    except BadRecord as bad:
        return Record(place, problem=str(bad))


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_csv(path: Path) -> Iterator[Record]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    broken: dict[int, str] = {}
    with _field_limit(MAX_LINE_BYTES):
        rows = csv.reader(_text_lines(path, broken), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            place = Place(str(path), rows.line_num + 1)
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(place, problem=f"not CSV: {error}")
                continue
            problem = next((broken[n] for n in range(place.number, rows.line_num + 1) if n in broken), "")
            if header is None:
                header = _header(cells, place, problem)
            else:
                yield _csv_record(place, header, cells, problem)


def _header(cells: list[str], place: Place, problem: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not problem and (not names or "" in names):
        problem = "the first line does not name every column"
    if not problem and len(set(names)) < len(names):
        problem = "the first line names a column twice"
    if problem:
        raise DataError(
            "DATA_BROKEN_LINE", problem, where=f"{place.file}:1", fix="let the first line name each column once"
        )
    return names


def _csv_record(place: Place, header: list[str], cells: list[str], problem: str) -> Record:
    if not problem and not cells:
        problem = "empty line"
    if not problem and len(cells) != len(header):
        problem = f"{len(cells)} cells where the first line names {len(header)} columns"
    if problem:
        return Record(place, problem=problem)
    return Record(place, dict(zip(header, cells, strict=True)))


@contextmanager
def _field_limit(num_chars: int) -> Iterator[None]:
    """Let the csv module read long cells; its limit is global, so the old one is put back."""
    before = csv.field_size_limit(num_chars)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            yield from table_records(file.iter_batches(batch_size=_ROWS_AT_ONCE), str(path))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(
            path, f"the file is not readable Parquet ({type(error).__name__})", "write it again, or export JSON Lines"
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number from 1, bytes without the line's end); None for a line that is too long to be a record."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                _refuse_utf16(path, raw[:2])
            if len(raw) <= MAX_LINE_BYTES or raw.endswith(b"\n"):
                yield number, raw.rstrip(b"\r\n")
                continue
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES)
            yield number, None


def _text_lines(path: Path, broken: dict[int, str]) -> Iterator[str]:
    """Yield decoded lines with their end; what is wrong with a line is noted in `broken`, by number."""
    for number, raw in _lines(path):
        try:
            text = _decode(raw)
        except BadRecord as bad:
            broken[number] = str(bad)
            text = "" if raw is None else raw.decode("utf-8", errors="replace")
        yield text + "\n"


def _decode(raw: bytes | None) -> str:
    if raw is None:
        raise BadRecord(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 (byte {error.start + 1})") from None


def _refuse_utf16(path: Path, start: bytes) -> None:
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise _unreadable(path, "the file is UTF-16, not UTF-8", "save it as UTF-8")


def _unreadable(path: Path, what: str, fix: str) -> DataError:
    return DataError("DATA_BROKEN_LINE", what, where=str(path), fix=fix)


def _parse(text: str) -> Any:
    if not text.strip():
        raise BadRecord("empty line")
    value, end = _parse_at(text, _skip_space(text, 0))
    if text[end:].strip():
        raise BadRecord(f"not JSON: more text after the record (column {end + 1})")
    return value


def _parse_at(text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value that starts at a position, and where it ends."""
    try:
        return _JSON.raw_decode(text, at)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise BadRecord(f"not JSON: {error.msg} ({line}column {error.colno})") from None
    except RecursionError:
        raise BadRecord("not usable JSON: nested too deeply") from None
    except BadRecord:
        raise
    except ValueError:
        raise BadRecord("not usable JSON: a number has too many digits") from None


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord("not a JSON object ({...})")
    if not value:
        raise BadRecord("an empty object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise BadRecord("the same key stands twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise BadRecord(f"{name} is not JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
