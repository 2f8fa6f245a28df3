"""jsonl:<path>: one JSON object per line with "prompt" and "answer", and "demonstration" where there is one."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gspo.data.rewards import exact_match
from gspo.data.tasks.rows import example_of
from gspo.data.tasks.task import Task, first
from gspo.types import UserError


def make(rest: str, *, split: str, seed: int, size: int | None) -> Task:
    """The lines of a file; "{split}" in the path is replaced by the split, and without it all splits are the same file
    (`tasks.check_splits` then asks whether that is meant).

    "prompt" (a text, or a list of messages) and "answer" must be there; "demonstration" may be; the other fields become
    the example's metadata (`rows.example_of`).
    """
    examples = [example_of(row, where) for row, where in rows_of(rest, split, size)]
    return Task(f"jsonl:{rest}", first(f"jsonl:{rest}", len(examples), size), examples.__getitem__, exact_match)


def same_file(rest: str, *splits: str) -> bool:
    """Whether two splits are one file, by one name or by two."""
    one, other = (_path(rest, split) for split in splits)
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _path(rest: str, split: str) -> Path:
    return Path(rest.replace("{split}", split))


def rows_of(rest: str, split: str, size: int | None) -> Iterator[tuple[Any, str]]:
    """The values of the first `size` lines, and where each of them stands, for messages. Raises UserError."""
    path = _path(rest, split)
    if not path.is_file():
        raise UserError(f"task.name='jsonl:{rest}': there is no file {path}")
    with path.open("rb") as lines:
        for number, line in enumerate(itertools.islice(lines, size), start=1):
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not a line of JSON ({error})") from None
            yield row, f"{path}:{number}"
