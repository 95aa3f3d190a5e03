"""A silo's data as rows: files, folders, patterns, and sets of the package ``datasets``."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.data.bad_rows import BadRows
from isthmus.data.formats import SUFFIXES, FileFields, FileRows, arrow_rows, need_package, parse_file
from isthmus.errors import DataError
from isthmus.recipe.sections.silo import HUB_SET

_BATCH = 1000
"""Rows of a set that are converted at a time."""
_CHECK_PATH = "check the path in the recipe"


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a data file."""

    place: str
    """``file:line``, for messages; ``file:row N`` in Parquet and sets of ``datasets``."""
    fields: dict[str, Any]


def read_rows(
    sources: Sequence[str],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    bad: BadRows | None = None,
) -> list[SourceRow]:
    """The rows of these sources, in their order; of a folder or a pattern, in the order of the files' names.

    Args:
        sources: files, folders, patterns such as ``data/*.csv``, folders that ``save_to_disk`` wrote, and
            ``datasets:NAME:SPLIT`` (see ``silo.train``). A file that several of them name is read once.
        format: that of all files, one of ``jsonl``, ``json``, ``csv``, ``tsv``, ``parquet``; None: by their names.
        columns: names that the rows' values get, each with the name that it has in the file.
        bad: gets the errors of rows and files that cannot be used or are empty, and the rest is returned; None: they
            are raised.

    Raises:
        DataError: a row or file cannot be used, or a file has no row, and there is no ``bad``.
    """
    collected = bad if bad is not None else BadRows()
    rows: list[SourceRow] = []
    for one in _located(sources, collected):
        before = len(rows) + collected.count
        with collected.collecting():
            for place, fields in _rows(one, format, collected):
                with collected.collecting():
                    rows.append(SourceRow(place, rename_columns(place, fields, columns or {})))
            if len(rows) + collected.count == before:
                raise DataError(f"{one} holds no row", remedy="put a row into it, or leave it out")
    if bad is None:
        collected.raise_any()
    return rows


def _located(sources: Sequence[str], bad: BadRows) -> list[str]:
    """The files, saved sets and hub sets that the sources name, each once."""
    found: dict[str, str] = {}
    for source in sources:
        with bad.collecting():
            try:
                for one in _named(source):
                    found.setdefault(one if one.startswith(HUB_SET) else str(Path(one).resolve()), one)
            except (OSError, ValueError, RuntimeError) as error:  # no permission, no such name, links in a circle
                raise DataError(f"cannot read the data file {source!r}: {error}", remedy=_CHECK_PATH) from error
    return list(found.values())


def _named(source: str) -> list[str]:
    """What one source names."""
    if source.startswith(HUB_SET):
        return [source]
    path = Path(source)
    if path.is_dir():
        return [source] if _saved(path) else _folder_files(path)
    if path.exists() or not glob.has_magic(source):
        return [source]
    base = next(folder for folder in path.parents if folder.is_dir())  # its name may hold the characters of patterns
    found = sorted(glob.glob(str(path.relative_to(base)), root_dir=base, recursive=True))
    matched = [str(base / one) for one in found if (base / one).is_file()]
    if not matched:
        raise DataError(f"no file matches {source}", remedy=_CHECK_PATH)
    return matched


def _saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder, of one set or of several splits."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _folder_files(path: Path) -> list[str]:
    """All data files in a folder and its folders, but hidden ones."""
    files = [one for one in sorted(path.rglob("*")) if one.is_file() and _format(one.name) is not None]
    visible = [str(one) for one in files if not any(part.startswith(".") for part in one.relative_to(path).parts)]
    if not visible:
        raise DataError(
            f"cannot read the data file {path}: it is a folder without data files",
            remedy=f"{_CHECK_PATH}; files are known by their names: {', '.join(SUFFIXES)}, each also with .gz",
        )
    return visible


def _format(name: str) -> str | None:
    """A file's format by its name."""
    return SUFFIXES.get(Path(name.lower().removesuffix(".gz")).suffix)


def _rows(source: str, format: str | None, bad: BadRows) -> FileRows:
    if source.startswith(HUB_SET):
        return _hub_rows(source, bad)
    path = Path(source)
    if path.is_dir():
        return _saved_rows(path, bad)
    kind = format or _format(path.name)
    if kind is None:
        raise DataError(
            f"{path} has no name that says its format",
            remedy="set silo.format, or end its name with one of " + ", ".join(SUFFIXES),
        )
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read the data file {path}: {why}", remedy=_CHECK_PATH) from error
    return parse_file(source, data, kind, bad)


def rename_columns(place: str, fields: FileFields, columns: Mapping[str, str]) -> FileFields:
    """The fields with the recipe's names for them, beside those of the file."""
    absent = [old for old in columns.values() if old not in fields]
    if absent:
        raise DataError(
            f"{place} has no column {absent[0]!r}, only {', '.join(map(repr, fields))}",
            remedy="correct silo.columns, or the row",
        )
    return {**fields, **{new: fields[old] for new, old in columns.items()}} if columns else fields


def _saved_rows(path: Path, bad: BadRows) -> FileRows:
    need_package("datasets")
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # of whatever a damaged folder makes pyarrow, json or datasets raise
        raise DataError(
            f"{path} is not a whole set of datasets: {_first_line(error)}", remedy="save it again"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        first = next(iter(found), "train")
        raise DataError(
            f"{path} holds several splits: {', '.join(found)}", remedy=f"name one of them: {path / str(first)}"
        )
    return _set_rows(str(path), found, bad)


def _hub_rows(source: str, bad: BadRows) -> FileRows:
    need_package("datasets")
    import datasets

    name, _, split = source.removeprefix(HUB_SET).partition(":")
    name, _, configuration = name.partition("@")
    try:
        found = datasets.load_dataset(name, configuration or None, split=split or None)
    except Exception as error:  # of the network, the hub, a file of any format, or a split that is not there
        raise DataError(
            f"cannot load {source}: {_first_line(error)}",
            remedy="write datasets:NAME:SPLIT or datasets:NAME@CONFIGURATION:SPLIT, and check the connection",
        ) from error
    if not isinstance(found, datasets.Dataset):
        raise DataError(f"{source} holds the splits {', '.join(found)}", remedy=f"name one: {source.rstrip(':')}:train")
    return _set_rows(source, found, bad)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _set_rows(name: str, found: Any, bad: BadRows) -> FileRows:
    """The rows of a set of the package ``datasets``. Classes are read by their names, not by their numbers."""
    import datasets

    classes = {key: one for key, one in found.features.items() if isinstance(one, datasets.ClassLabel)}
    for place, fields in arrow_rows(name, _batches(name, found), bad):
        named = {key: _class_name(one, fields[key]) for key, one in classes.items()}
        yield place, {**fields, **named}


def _batches(name: str, found: Any) -> Iterator[Any]:
    """A set's tables, each checked whole: what Arrow maps from a disk it believes."""
    import pyarrow

    try:
        for table in found.with_format("arrow").iter(_BATCH):
            table.validate(full=True)
            yield table
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name} is damaged: {_first_line(error)}", remedy="save or load it again") from error


def _class_name(classes: Any, number: int | None) -> str | None:
    """The name of a class; None where a row has none, which ``datasets`` writes as -1."""
    return classes.names[number] if number is not None and 0 <= number < len(classes.names) else None
