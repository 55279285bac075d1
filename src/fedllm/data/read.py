"""Examples of a source: read, layout detected or mapped, every problem found in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedllm.data.files import Place, Record
from fedllm.data.formats import BadRecord, ColumnMap, Example, closest_layout, show_columns
from fedllm.data.rows import row_hash, rows_digest
from fedllm.data.settings import DataSettings, DataSource, local_path
from fedllm.data.sources import read_records
from fedllm.errors import DataError, nearest
from fedllm.tasks import TaskName

_SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """Why one record cannot be used."""

    place: Place
    why: str


@dataclass(frozen=True)
class Scan:
    """All that one pass over a source finds.

    Args:
        layout: Layout of the records; empty when it could not be told.
        examples: Those that can be used.
        places: Where each example stands, in the same order.
        problems: Records that cannot be used.
        refusals: Why training would refuse the source; empty when it would not.
        columns: Columns found.
        unused: Columns that the layout does not use.
        num_records: Records seen, the broken ones included.
        digest: Of the raw rows of the examples, from `rows_digest`.
    """

    layout: str
    examples: tuple[Example, ...]
    places: tuple[Place, ...]
    problems: tuple[Problem, ...]
    refusals: tuple[DataError, ...]
    columns: tuple[str, ...]
    unused: tuple[str, ...]
    num_records: int
    digest: str


@dataclass(frozen=True)
class PartyData:
    """What a party trains on and what it evaluates on.

    `digest` is of all raw rows of its training data, before any are held out: nothing that a job says changes it.
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    digest: str


def read_examples(
    source: str,
    *,
    base_dir: Path,
    split: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    settings: DataSettings | None = None,
) -> tuple[Example, ...]:
    """Return the examples of a source, in the order of the file.

    Args:
        source: File, folder, or hub id.
        base_dir: Where relative paths start.
        split: Name of the split; None where the source has only one.
        format: `auto`, or the name of a layout.
        columns: Layout's column -> name in the file.
        settings: The job's `data` section, for the column of plain text and the task.

    Raises:
        DataError: The source cannot be used as it is: `DATA_NOT_FOUND`, `DATA_FORMAT_UNKNOWN`,
            `DATA_COLUMN_MISSING`, `DATA_BROKEN_LINE` or `DATA_EMPTY`.
    """
    column_map = _column_map(format, columns or {}, settings or DataSettings())
    return _usable(source, split, base_dir=base_dir, column_map=column_map).examples


def read_party_data(source: DataSource, *, base_dir: Path, settings: DataSettings, seed: int, party: str) -> PartyData:
    """Return a party's training and held-out examples.

    Args:
        source: The `data` section of party.yaml.
        base_dir: The folder of party.yaml.
        settings: The job's `data` section.
        seed: The job's seed, for the share split off.
        party: The party's name.

    Raises:
        DataError: As `read_examples` and `split_held_out`.
    """

    column_map = _column_map(source.format, source.columns, settings)
    read = partial(_usable, base_dir=base_dir, column_map=column_map)
    found = read(source.train, source.train_split)
    if source.eval is None and source.eval_split is None:
        train, held_out = split_held_out(found.examples, source.eval_share, seed=seed, party=party)
    else:
        train, held_out = found.examples, read(source.eval or source.train, source.eval_split).examples
    return PartyData(train, held_out, found.digest)


def split_held_out(
    examples: Sequence[Example], share: float, *, seed: int, party: str
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return (training, held-out) examples; equal ones, and all of a person, always land on the same side.

    About `share` of the examples are held out, at least one; both sides keep the order of the file. With many
    duplicates the held-out side may be smaller than asked for.

    Args:
        examples: All examples of the party.
        share: Share to hold out, 0 <= share < 1; 0 holds out none.
        seed: The job's seed.
        party: The party's name.

    Raises:
        DataError: `DATA_EMPTY` when there are not two different examples to put on the two sides.
    """
    from fedllm.seeds import stream

    if share == 0:
        return tuple(examples), ()
    groups: dict[Example | str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.group or example, []).append(i)
    if len(groups) < 2:
        raise DataError(
            "DATA_EMPTY",
            f"{len(groups)} different example(s) cannot be split into training and held-out ones",
            where=f"party {party}",
            fix="add examples, name `eval` data, or set `eval_share: 0`",
        )
    target = min(max(1, round(share * len(examples))), len(examples) - 1)
    members = list(groups.values())
    held: set[int] = set()
    for g in stream(seed, "held_out", party).permutation(len(members)):
        if len(held) + len(members[g]) <= target:
            held.update(members[g])
    if not held:
        smallest = min(members, key=len)
        held.update(smallest)
    return (
        tuple(example for i, example in enumerate(examples) if i not in held),
        tuple(example for i, example in enumerate(examples) if i in held),
    )


def scan_source(source: str, *, base_dir: Path, split: str | None, column_map: ColumnMap) -> Scan:
    """Return all that can be found out about a source in one pass, problems included.

    Args:
        source: File, folder, or hub id.
        base_dir: Where relative paths start.
        split: Name of the split; None where the source has only one.
        column_map: Layout and column names.

    Raises:
        DataError: The source is not there, or a file of it cannot be read at all.
    """
    records = list(read_records(source, base_dir=base_dir, split=split))
    where = str(local_path(source, base_dir))
    readable = [record for record in records if not record.problem]
    columns = tuple(dict.fromkeys(name for record in readable for name in record.fields))
    problems = [Problem(record.place, record.problem) for record in records if record.problem]
    if not records:
        empty = DataError("DATA_EMPTY", "there is no example in it", where=where, fix="name the data you meant")
        return Scan("", (), (), (), (empty,), (), (), 0, "")
    layout, refusal = _layout_of(readable, columns, column_map, where)
    examples, places, hashes = [], [], []
    for record in readable if layout else ():
        try:
            example, hash_ = column_map.example(layout, record.fields), row_hash(record.fields)
            examples.append(example)
            places.append(record.place)
            hashes.append(hash_)
        except BadRecord as bad:
            problems.append(Problem(record.place, str(bad)))
    return Scan(
        layout=layout,
        examples=tuple(examples),
        places=tuple(places),
        problems=tuple(sorted(problems, key=lambda p: (p.place.file, p.place.number))),
        refusals=_refusals(refusal, problems, len(records)),
        columns=columns,
        unused=tuple(name for name in columns if layout and name not in column_map.used(layout)),
        num_records=len(records),
        digest=rows_digest(hashes),
    )


def _column_map(format_: str, columns: Mapping[str, str], settings: DataSettings) -> ColumnMap:
    return ColumnMap(format_, dict(columns), settings.dataset_text_field, settings.task, settings.group_by)


def _usable(source: str, split: str | None, *, base_dir: Path, column_map: ColumnMap) -> Scan:
    """Return what a pass over a source finds, where training would not refuse it."""
    scan = scan_source(source, base_dir=base_dir, split=split, column_map=column_map)
    if scan.refusals:
        raise scan.refusals[0]
    return scan


def _refusals(refusal: DataError | None, problems: list[Problem], num_records: int) -> tuple[DataError, ...]:
    found = [refusal] if refusal else []
    if problems:
        found.append(_broken_lines(problems, num_records))
    return tuple(found)


def _broken_lines(problems: list[Problem], num_records: int) -> DataError:
    problems = sorted(problems, key=lambda p: (p.place.file, p.place.number))
    shown = "; ".join(f"{p.place}: {p.why}" for p in problems[:_SHOWN])
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    first = problems[0].place
    return DataError(
        "DATA_BROKEN_LINE",
        f"{len(problems)} of {num_records} records cannot be used ({shown}{more})",
        where=f"{first.file}:{first.number}",
        fix="mend or remove them; `fedllm data check` lists all",
    )


def _layout_of(
    readable: list[Record], columns: tuple[str, ...], column_map: ColumnMap, where: str
) -> tuple[str, DataError | None]:
    """Return the layout of the records, or the reason why it cannot be told."""
    if not readable:
        return "", None
    if missing := _missing_columns(columns, column_map, where):
        return "", missing
    if len(candidates := column_map.candidates()) == 1:
        return candidates[0], None
    places: dict[tuple[str, ...], list[Place]] = {}
    for record in readable:
        places.setdefault(column_map.matching(record.fields), []).append(record.place)
    known = [names for names in places if names]
    if not known:
        return "", _unknown(columns, where, column_map.task)
    if len(known) > 1:
        return "", _mixed({names: places[names] for names in known}, where)
    if len(known[0]) > 1:
        return "", _ambiguous(known[0], columns, where)
    return known[0][0], None


def _missing_columns(columns: tuple[str, ...], column_map: ColumnMap, where: str) -> DataError | None:
    """Return an error when a column that the user asked for is in no record."""
    missing = [name for name in column_map.columns.values() if name not in columns]
    if not missing and len(candidates := column_map.candidates()) == 1:
        missing = column_map.absent(candidates[0], columns)
    if not missing:
        return None
    return DataError(
        "DATA_COLUMN_MISSING",
        f"no record has a column {missing[0]!r}; found: {show_columns(columns)}",
        where=where,
        fix=_nearest_column(missing[0], columns) or _mapping(column_map, columns) or "correct `columns` or `format`",
    )


def _mapping(column_map: ColumnMap, columns: tuple[str, ...]) -> str:
    layout, mapping = closest_layout(columns, column_map.task)
    fits = not column_map.columns and layout in column_map.candidates() and mapping
    return f"map the columns: `columns: {{{_pairs(mapping)}}}`" if fits else ""


def _pairs(mapping: Mapping[str, str]) -> str:
    return ", ".join(f"{column}: {name}" for column, name in mapping.items())


def _nearest_column(name: str, columns: tuple[str, ...]) -> str:
    hint = nearest(name, columns)
    return hint if hint.startswith("did you mean") else ""


def _unknown(columns: tuple[str, ...], where: str, task: TaskName) -> DataError:
    if {"chosen", "rejected"} <= set(columns):
        what = "these are preference pairs (`chosen`, `rejected`), which supervised tuning cannot use"
        return DataError("DATA_FORMAT_UNKNOWN", what, where=where, fix="rename `chosen` to `completion`")
    layout, mapping = closest_layout(columns, task)
    fix = f"the nearest layout is `{layout}`"
    if mapping:
        fix += f"; if that is meant, map its columns: `columns: {{{_pairs(mapping)}}}`"
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        fix = "the cells seem to be separated by semicolons or tabs; save the file with commas"
    what = f"the records have no known layout; columns found: {show_columns(columns)}"
    return DataError("DATA_FORMAT_UNKNOWN", what, where=where, fix=fix)


def _ambiguous(layouts: tuple[str, ...], columns: tuple[str, ...], where: str) -> DataError:
    names = ", ".join(f"`{name}`" for name in layouts)
    return DataError(
        "DATA_FORMAT_UNKNOWN",
        f"the records fit several layouts: {names}; columns found: {show_columns(columns)}",
        where=where,
        fix=f"say which one is meant, for instance `format: {layouts[0]}`",
    )


def _mixed(places: Mapping[tuple[str, ...], list[Place]], where: str) -> DataError:
    parts = []
    for layouts, found in places.items():
        shown = ", ".join(str(place.number) for place in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        parts.append(f"{' or '.join(layouts)} ({found[0].unit}s {shown}{more})")
    return DataError(
        "DATA_FORMAT_UNKNOWN",
        f"the records have different layouts: {'; '.join(parts)}",
        where=where,
        fix="put each layout into a file of its own, or name the one to use by `format`",
    )
