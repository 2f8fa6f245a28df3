"""dataset:<folder>: Parquet or Arrow files as Hugging Face's `datasets` writes them, read by pyarrow (an optional
extra). Nothing is downloaded, and `datasets` itself is not needed.

A split is looked for as, in this order,

    <folder>/<split>/*.parquet, *.arrow             DatasetDict.save_to_disk, and most folders made by hand
    <folder>/<split>.parquet, <split>-00000-of-00002.parquet, name-<split>.arrow     (also under data/)
                                                    the Hub's own layout, Dataset.to_parquet, the cache of `datasets`
    <folder>/*.arrow beside state.json              Dataset.save_to_disk: one table, whatever the split is called

<folder> may be a single file, with {split} in its name or without."""

import json
import re
from pathlib import Path
from typing import Any

from gspo.data.example import Example
from gspo.data.rewards import exact_match
from gspo.data.tasks.rows import example_of
from gspo.data.tasks.task import Task, first, suggest
from gspo.types import UserError

KINDS = (".parquet", ".arrow")
_PART = r"(?:-\d{5}-of-\d{5})?"


def make(
    rest: str,
    *,
    split: str,
    seed: int,
    size: int | None,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    demonstration_field: str = "demonstration",
) -> Task:
    """Columns by name, as `rows.example_of` reads them; scored by `exact_match`."""
    name = f"dataset:{rest}"
    table = _table(name, _files(rest, split))
    columns = list(table.column_names)
    for field, column in (("prompt_field", prompt_field), ("answer_field", answer_field)):
        if column not in columns and "messages" not in columns:
            raise UserError(
                f"task.options.{field}={column!r}: {name} has only the columns {', '.join(columns)}"
                f"{suggest(column, columns)}"
            )
    fields = {
        "prompt_field": prompt_field, "answer_field": answer_field, "demonstration_field": demonstration_field,
    }  # fmt: skip

    def example(index: int) -> Example:
        (row,) = table.slice(index, 1).to_pylist()
        return example_of(row, f"{name}, split {split!r}, row {index}", **fields)

    return Task(name, first(name, table.num_rows, size), example, exact_match)


def same_files(rest: str, *splits: str) -> bool:
    """Whether two splits have a file in common, by one name or by two."""
    one, other = ({path.resolve() for path in _files(rest, split)} for split in splits)
    return bool(one & other)


def _files(rest: str, split: str) -> list[Path]:
    """The files of a split, in order. Raises UserError where there are none."""
    path = Path(rest.replace("{split}", split)).expanduser()
    if path.is_file():
        return [path]
    found = _tables_in(path / split)
    if not found:
        wanted = re.compile(rf"(?:.*-)?{re.escape(split)}{_PART}")
        found = [file for place in (path, path / "data") for file in _tables_in(place) if wanted.fullmatch(file.stem)]
    if not found and (path / "state.json").is_file():
        found = _tables_in(path)
    if not found:
        there = "no such folder"
        if path.is_dir():
            there = f"there are {', '.join(_splits_in(path)) or 'no Parquet or Arrow files'}"
        raise UserError(f"task.name='dataset:{rest}', split {split!r}: not found in {path}; {there}")
    return found


def _tables_in(folder: Path) -> list[Path]:
    """`datasets` keeps beside a saved table what it computed from it (cache-*.arrow): not part of it. A saved table
    says which files it consists of."""
    files = sorted(path for path in folder.glob("*") if path.suffix in KINDS and not path.name.startswith("cache-"))
    try:
        own = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return files
    return [folder / name for name in own]


def _splits_in(folder: Path) -> list[str]:
    inner = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and _tables_in(path)]
    outer = [re.sub(rf"{_PART}$", "", path.stem) for place in (folder, folder / "data") for path in _tables_in(place)]
    return list(dict.fromkeys([*inner, *outer]))


def _table(name: str, files: list[Path]) -> Any:
    """All rows; Arrow files stay on disk until a row is read."""
    try:
        import pyarrow as pa
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'task.name={name!r}: needs an optional package: pip install "pyarrow>=18"') from None

    def read(path: Path) -> pa.Table:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        source = pa.memory_map(str(path))
        try:
            return pyarrow.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:  # Arrow has two formats; `datasets` writes the one above, others the one below
            return pyarrow.ipc.open_file(source).read_all()

    tables = []
    for path in files:
        try:
            tables.append(read(path))
        except (pa.ArrowException, OSError, ValueError) as error:
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"task.name={name!r}: {path} cannot be read: {first_line:.200}") from None
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"task.name={name!r}: its files do not have the same columns: {first_line:.200}") from None
