"""Tasks: examples by integer index, each a pure function of (split, seed, index).

    running_sum            running_sum.py   a toy of known pass@1
    reasoning_gym:<name>   reasoning.py     the procedural tasks of the reasoning-gym package (an optional extra)
    tfds:<name>            tfds.py          prepared tensorflow-datasets folders, gsm8k first of all
    jsonl:<path>           jsonl.py         a file of your own

Nothing is shuffled here: the order of a run is `batches.shuffled_index`. A new kind of task is a file whose `make`
returns a `Task`, and a line in `TASKS`; its keyword arguments are the options that a config may set.
"""

import inspect
from collections.abc import Callable
from typing import Any

from gspo.data.tasks import jsonl, reasoning, running_sum, tfds
from gspo.data.tasks.task import Task, check_options, suggest
from gspo.types import UserError

__all__ = ["TASKS", "Task", "make_task"]

TASKS: dict[str, Callable[..., Task]] = {
    "running_sum": running_sum.make,
    "reasoning_gym": reasoning.make,
    "tfds": tfds.make,
    "jsonl": jsonl.make,
}


def make_task(name: str, *, split: str, seed: int = 0, size: int | None = None, **options: Any) -> Task:
    """The task of that name. `size` limits it to the first examples; procedural tasks are as long as `size` says."""
    kind, _, rest = name.partition(":")
    if kind not in TASKS or bool(rest) != (kind != "running_sum"):
        known = ["running_sum", "reasoning_gym:<name>", "tfds:gsm8k", "jsonl:<path>"]
        raise UserError(f"unknown task {name!r}: there are {', '.join(known)}{suggest(name, known)}")
    if size is not None and size < 1:
        raise UserError(f"task {name} with size={size} is an empty data set: give a size of 1 or more")
    build = TASKS[kind]
    parameters = inspect.signature(build).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        check_options(name, options, [p.name for p in parameters if p.name not in ("rest", "split", "seed", "size")])
    task = build(rest, split=split, seed=seed, size=size, **options)
    if len(task) == 0:
        raise UserError(f"task {name}, split {split!r} is an empty data set")
    return task
