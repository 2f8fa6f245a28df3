"""Tasks: examples by integer index, each a pure function of (split, seed, index).

    running_sum            running_sum.py   a toy of known pass@1
    arithmetic             arithmetic.py    questions of one step in plain English, for pretrained models
    reasoning_gym:<name>   reasoning.py     the procedural tasks of the reasoning-gym package (an optional extra)
    tfds:<name>            tfds.py          prepared tensorflow-datasets folders, gsm8k first of all
    jsonl:<path>           jsonl.py         a file of your own
    dataset:<path>         dataset.py       Parquet or Arrow files, as Hugging Face's `datasets` writes them

Nothing is shuffled here: the order of a run is `batches.shuffled_index`. A new kind of task is a file whose `make`
returns a `Task`, and a line in `TASKS`; its keyword arguments are the options that a config may set.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from gspo.data.example import with_system_prompt
from gspo.data.tasks import arithmetic, dataset, jsonl, reasoning, running_sum, tfds
from gspo.data.tasks.task import Task, check_options, suggest
from gspo.types import UserError

__all__ = ["TASKS", "Task", "check_splits", "make_task"]

TASKS: dict[str, Callable[..., Task]] = {
    "running_sum": running_sum.make,
    "arithmetic": arithmetic.make,
    "reasoning_gym": reasoning.make,
    "tfds": tfds.make,
    "jsonl": jsonl.make,
    "dataset": dataset.make,
}


def make_task(
    name: str, *, split: str, seed: int = 0, system_prompt: str = "", size: int | None = None, **options: Any
) -> Task:
    """The task of that name. `size` limits it to the first examples; procedural tasks are as long as `size` says.
    system_prompt: what its conversations begin with."""
    kind, _, rest = name.partition(":")
    if kind not in TASKS or bool(rest) == (kind in ("running_sum", "arithmetic")):
        known = [
            "running_sum", "arithmetic", "reasoning_gym:<name>", "tfds:gsm8k", "jsonl:<path>", "dataset:<path>",
        ]  # fmt: skip
        raise UserError(f"task.name={name!r}: unknown; there are {', '.join(known)}{suggest(name, known)}")
    if size is not None and size < 1:
        raise UserError(f"task.options.size={size}: task {name} would be an empty data set; give 1 or more")
    build = TASKS[kind]
    parameters = inspect.signature(build).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        check_options(name, options, [p.name for p in parameters if p.name not in ("rest", "split", "seed", "size")])
    task = build(rest, split=split, seed=seed, size=size, **options)
    if len(task) == 0:
        raise UserError(f"task.name={name!r}: split {split!r} is an empty data set")
    if system_prompt:
        plain = task.example
        task = dataclasses.replace(task, example=lambda index: with_system_prompt(plain(index), system_prompt))
    return task


def check_splits(
    name: str, *, train_split: str, eval_split: str, size: int | None = None, data_dir: str | None = None, **_: Any
) -> str | None:
    """Keeps evaluation off the training examples. The keywords besides the splits are those of `make_task`.

    Raises UserError where the two splits have different names and examples in common: the same file, or overlapping
    slices. Splits named alike are taken for a choice, and one line for the log is returned. running_sum,
    arithmetic and reasoning_gym keep their own two splits apart.
    """
    if train_split == eval_split:
        return f"evaluation reads training examples: task.eval_split={eval_split!r} is task.train_split"
    kind, _, rest = name.partition(":")
    remedy = f"or set task.eval_split={train_split!r} like task.train_split to evaluate on training examples on purpose"
    if kind == "jsonl" and jsonl.same_file(rest, train_split, eval_split):
        raise UserError(
            f"task.name={name!r}: training and evaluation would read the same lines; write {{split}} into the path, as "
            f"in jsonl:data/{{split}}.jsonl with files {train_split}.jsonl and {eval_split}.jsonl, {remedy}"
        )
    if kind == "dataset" and dataset.same_files(rest, train_split, eval_split):
        raise UserError(
            f"task.name={name!r}: training and evaluation would read the same file; give each split its own, {remedy}"
        )
    if kind == "tfds" and (shared := tfds.num_shared(rest, train_split, eval_split, size, data_dir)):
        raise UserError(
            f"task.eval_split={eval_split!r}: {shared} of its examples are in task.train_split={train_split!r} too; "
            f"choose slices that do not overlap, such as train[:90%] and train[90%:], {remedy}"
        )
    return None
