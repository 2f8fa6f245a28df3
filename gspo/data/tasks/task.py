"""What a task is, and the checks that all kinds share."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable

from gspo.data.example import Example
from gspo.data.rewards import RewardFunction
from gspo.types import UserError


@dataclasses.dataclass(frozen=True)
class Task:
    """`task[i]` for 0 <= i < len(task). `reward` is what the task is scored with unless a config names other
    rewards."""

    name: str
    size: int
    example: Callable[[int], Example]
    reward: RewardFunction

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:  # also ends `for example in task`
            raise IndexError(f"{self.name} has examples 0..{self.size - 1}, not {index}")
        return self.example(int(index))


def suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_options(name: str, options: Iterable[str], known: Iterable[str]) -> None:
    known = sorted(known)
    for option in options:
        if option not in known:
            names = ", ".join(known) or "size"
            raise UserError(f"task.options.{option}: task {name} has only {names}{suggest(option, known)}")


def check_split(name: str, split: str) -> None:
    if split not in ("train", "test"):
        raise UserError(f"task.train_split, task.eval_split: task {name} has 'train' and 'test', not {split!r}")


def first(name: str, available: int, size: int | None) -> int:
    if size is not None and size > available:
        raise UserError(f"task.options.size={size}: task {name} has only {available} examples")
    return available if size is None else size
