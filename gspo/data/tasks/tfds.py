"""tfds:<name>: a prepared tensorflow-datasets folder, read without TensorFlow; gsm8k is understood field by field."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gspo.data.example import Example
from gspo.data.rewards import exact_match, hash_answer, numeric_answer
from gspo.data.tasks.task import Task, first
from gspo.types import UserError


def make(
    rest: str,
    *,
    split: str,
    seed: int,
    size: int | None,
    data_dir: str | None = None,
    answer_format: str = "hash",
    keep_calculator: bool = False,
    prompt_field: str | None = None,
    answer_field: str | None = None,
) -> Task:
    """A tfds data set, by random access; `split` may be a slice such as "train[:256]".

    data_dir         where prepared data sets lie; else the environment's TFDS_DATA_DIR, else tfds' own default
    answer_format    "hash": the answer stands after "####" (`hash_answer`); "free": the last number counts
                     (`numeric_answer`)
    keep_calculator  gsm8k: keep annotations such as <<16/2=8>> in the demonstrations
    prompt_field, answer_field   for data sets other than gsm8k: the fields to read, as they stand (`exact_match`)

    gsm8k: the prompt is "Question: ...\\nAnswer:\\n", the demonstration the worked solution, which ends in "####
    <answer>"."""
    name = f"tfds:{rest}"
    formats = {"hash": hash_answer, "free": numeric_answer}
    if answer_format not in formats:
        raise UserError(f"task.options.answer_format={answer_format!r}: choose 'hash' or 'free'")
    if rest != "gsm8k" and not (prompt_field and answer_field):
        raise UserError(
            f"task.options.prompt_field, task.options.answer_field: {name} needs both (only tfds:gsm8k knows its own)"
        )
    source = open_split(rest, split, data_dir)

    def gsm8k(index: int) -> Example:
        row = source[index]
        solution = row["answer"].decode().strip()
        if not keep_calculator:
            solution = re.sub(r"<<[^<>]*>>", "", solution)
        answer = solution.rpartition("####")[2].strip().replace(",", "")
        return Example(f"Question: {row['question'].decode().strip()}\nAnswer:\n", answer, solution)

    def other(index: int) -> Example:
        row = source[index]
        try:
            return Example(
                *(
                    value.decode() if isinstance(value, bytes) else str(value)
                    for value in (row[prompt_field], row[answer_field])
                )
            )
        except KeyError as error:
            raise UserError(
                f"task.options.prompt_field, task.options.answer_field: {name} has no field {error.args[0]!r}, only "
                f"{', '.join(sorted(row))}"
            ) from None

    if rest == "gsm8k":
        return Task(name, first(name, len(source), size), gsm8k, formats[answer_format])
    return Task(name, first(name, len(source), size), other, exact_match)


def num_shared(rest: str, train_split: str, eval_split: str, size: int | None, data_dir: str | None) -> int:
    """How many examples the first `size` of two splits have in common; slices may be sums, and count in percent."""

    def parts(builder) -> list[list[tuple[str, int, int]]]:
        return [_parts(builder.info.splits[split].file_instructions, size) for split in (train_split, eval_split)]

    train, evaluated = _read(rest, f"{train_split}, {eval_split}", data_dir, parts)
    return sum(
        max(0, min(stop, other_stop) - max(start, other_start))
        for file, start, stop in train
        for other_file, other_start, other_stop in evaluated
        if file == other_file
    )


def _parts(instructions: list, size: int | None) -> list[tuple[str, int, int]]:
    """(file, first, past the last) of what is read, up to `size` examples."""
    parts, left = [], float("inf") if size is None else size
    for part in instructions:
        count = min(left, part.examples_in_shard - part.skip if part.takes_all else part.take)
        parts.append((str(part.filename), part.skip, part.skip + count))
        left -= count
    return parts


def open_split(name: str, split: str, data_dir: str | None) -> Any:
    """The random-access source of a split."""

    def opened(builder):
        if builder.info.splits[split].num_examples == 0:
            return []
        source = builder.as_data_source(split=split)
        source[0]  # opens the files
        return source

    return _read(name, split, data_dir, opened)


def _read(name: str, split: str, data_dir: str | None, read: Callable[[Any], Any]) -> Any:
    """read(builder) of a prepared data set, with mistakes and damage as one line. Nothing is ever downloaded."""
    import tensorflow_datasets as tfds  # takes a second: only those wait who need it

    folder = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or str(tfds.core.constants.DATA_DIR))
    prepare = (
        f'python -c "from tensorflow_datasets.text.gsm8k import Gsm8k; '
        f"Gsm8k(data_dir='{folder}', file_format='array_record').download_and_prepare()\""
        if name == "gsm8k"
        else f"tfds build {name} --data_dir={folder} --file_format=array_record"
    )
    if not (Path(folder) / re.split("[/:]", name)[0]).is_dir():
        raise UserError(
            f"task.name='tfds:{name}': not in {folder}; set TFDS_DATA_DIR (or task.options.data_dir) to the folder "
            f"that holds it, or prepare it there once with: {prepare}"
        )
    try:
        return read(tfds.builder(name, data_dir=folder))
    except ValueError as error:
        raise UserError(f"task.name='tfds:{name}', split {split!r}: {str(error).splitlines()[0]}") from None
    except Exception as error:
        raise UserError(
            f"task.name='tfds:{name}': {folder} cannot be read ({str(error).splitlines()[0]}); prepare it again with: "
            f"{prepare}"
        ) from None
