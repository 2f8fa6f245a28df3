"""jsonl:<path>: one JSON object per line with "prompt" and "answer", and "demonstration" where there is one."""

import itertools
import json
from pathlib import Path

from gspo.data.example import Example
from gspo.data.rewards import exact_match
from gspo.data.tasks.task import Task, first, suggest
from gspo.types import UserError


def make(rest: str, *, split: str, seed: int, size: int | None) -> Task:
    """The lines of a file; "{split}" in the path is replaced by the split, and without it all splits are the same file
    (`tasks.check_splits` then asks whether that is meant).

    "prompt" and "answer" must be there; "demonstration" may be; the other fields become the example's metadata.
    """
    path = _path(rest, split)
    if not path.is_file():
        raise UserError(f"task.name='jsonl:{rest}': there is no file {path}")
    examples = []
    with path.open("rb") as lines:
        for number, line in enumerate(itertools.islice(lines, size), start=1):
            examples.append(_example(line, f"{path}:{number}"))
    return Task(f"jsonl:{rest}", first(f"jsonl:{rest}", len(examples), size), examples.__getitem__, exact_match)


def same_file(rest: str, *splits: str) -> bool:
    """Whether two splits are one file, by one name or by two."""
    one, other = (_path(rest, split) for split in splits)
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _path(rest: str, split: str) -> Path:
    return Path(rest.replace("{split}", split))


def _example(line: bytes, where: str) -> Example:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the fields 'prompt' and 'answer', not {type(row).__name__}")
    row = {key: str(value) if key == "answer" and type(value) in (int, float) else value for key, value in row.items()}
    for field in ("prompt", "answer", "demonstration"):
        if field not in row and field != "demonstration":
            raise UserError(f"{where}: field {field!r} is missing{suggest(field, row)}")
        if field in row and not (isinstance(row[field], str) and (row[field] or field == "answer")):
            raise UserError(f"{where}: field {field!r} should be a text that is not empty, not {row[field]!r:.40}")
    prompt, answer, demonstration = row.pop("prompt"), row.pop("answer"), row.pop("demonstration", None)
    return Example(prompt, answer, demonstration, row or None)
