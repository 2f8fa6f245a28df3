"""Rewards of the user's own: "module:function", imported from the working directory, in one of two forms.

    def brevity(completion: str, example: Example) -> float                      ours: one completion at a time
    def brevity(completions, prompts, **columns) -> list[float]                  TRL's: the completions of one prompt

The signature decides: who takes `completions` by that name (or only keywords) gets TRL's call. Its keyword arguments
are the columns of the data, one value per completion: "answer", "demonstration" where there is one, and whatever else
the data has. Where the data has messages, prompts and completions are lists of messages, as in TRL; None is 0 there.

What such a function may do wrong is met here, in one place (`attempt`): it raises, returns NaN or a list of another
length, prints, calls sys.exit. What cannot be stopped from within (it hangs, it crashes) is for `reward_pool`.
"""

import contextlib
import importlib
import inspect
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gspo.data import math_answers
from gspo.data.example import Example
from gspo.types import UserError

MATH_VERIFY = "math_verify"
LARGEST = float(np.finfo(np.float32).max)  # in which rewards are kept and compared


@dataclass(frozen=True)
class Reward:
    """call(texts, examples) -> one value for each. by_group: whether a call takes the completions of one prompt
    together, or one completion. by_name: whether another process can load it by its name."""

    name: str
    call: Callable[[Sequence[str], Sequence[Example]], Sequence[Any]]
    by_group: bool = False
    by_name: bool = False


class Called(NamedTuple):
    """What became of one call: values, 0 where it failed; why it failed, or ""; the first line that it printed."""

    values: list[float]
    error: str = ""
    printed: str = ""


def one_by_one(name: str, function: Callable[[str, Example], float], by_name: bool = False) -> Reward:
    """A reward in our form. It is called with one completion at a time."""
    return Reward(name, lambda texts, examples: [function(texts[0], examples[0])], by_name=by_name)


# ---------------------------------------------------------------------------------------------------- loading


def load(name: str, example: Example, field: str = "rewards") -> Reward:
    """The reward of that name, "module:function" or "math_verify". example: one of the data, whose columns the function
    may ask for. field: of the config that names it. Raises UserError where it cannot be imported, or cannot be called
    as either form."""
    if name == MATH_VERIFY:
        math_answers.check_installed(field)
        return one_by_one(name, math_answers.math_verify, by_name=True)
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # first, as for `python -m`; the module may import its neighbours later
    try:
        with _unheard():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(f"{field}: {name!r}: importing {module_name!r} in {here} failed: {_told(error)}") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{field}: {name!r}: {module.__file__ or module_name} has no function {attribute!r}")
    return _in_its_form(name, function, example, field)


def columns_of(example: Example) -> dict[str, Any]:
    """What TRL's form gets of an example besides its prompt."""
    columns = {str(key): value for key, value in (example.metadata or {}).items()} | {"answer": example.answer}
    return columns if example.demonstration is None else columns | {"demonstration": example.demonstration}


def _in_its_form(name: str, function: Callable, example: Example, field: str) -> Reward:
    forms = "def f(completion, example) -> float, or def f(completions, prompts, **columns) -> list[float]"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise UserError(f"{field}: {name!r} does not show its arguments; wrap it: {forms}") from None
    if inspect.iscoroutinefunction(function):
        raise UserError(f"{field}: {name!r} is an async function, which is not awaited here; write {forms}")
    parameters = signature.parameters
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    try:
        signature.bind("", example)
        ours = not {"completions", "prompts", "completion_ids"} & set(parameters)
    except TypeError:
        ours = False
    if ours:
        return one_by_one(name, function, by_name=True)
    if "completions" not in parameters and not any_keyword:
        raise UserError(f"{field}: {name!r} takes {signature}; write {forms}")
    known = ["prompts", "completions", *columns_of(example)]
    for p in parameters.values():
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in known:
            raise UserError(f"{field}: {name!r} asks for {p.name!r}; the data has only {', '.join(known)}")
    wanted = None if any_keyword else set(parameters)
    return Reward(name, lambda texts, examples: _as_trl(function, wanted, texts, examples), by_group=True, by_name=True)


def _as_trl(function: Callable, wanted: set[str] | None, texts: Sequence[str], examples: Sequence[Example]) -> Any:
    """TRL's call, with all columns or those `wanted`."""
    rows = [columns_of(example) for example in examples]
    names = dict.fromkeys(name for row in rows for name in row)
    arguments: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    chat = [example.messages is not None for example in examples]
    arguments["prompts"] = [list(e.messages) if e.messages is not None else e.prompt for e in examples]
    arguments["completions"] = [
        [{"role": "assistant", "content": text}] if is_chat else text for is_chat, text in zip(chat, texts, strict=True)
    ]
    values = function(**{name: value for name, value in arguments.items() if wanted is None or name in wanted})
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != len(texts):
        shown = f"{len(values)} values" if hasattr(values, "__len__") else repr(values)
        raise ValueError(f"returned {shown:.60} for {len(texts)} completions, not a list of as many floats")
    return [0.0 if value is None else value for value in values]


# ---------------------------------------------------------------------------------------------------- calling


def attempt(reward: Reward, texts: Sequence[str], examples: Sequence[Example]) -> Called:
    """One call, whatever it does short of hanging and crashing. What it prints is not shown: only the first line is
    kept, for the log."""
    said = _Said()
    try:
        with _unheard(said) if reward.by_name else contextlib.nullcontext():
            values = [float(value) for value in reward.call(texts, examples)]
        bad = next((value for value in values if not abs(value) <= LARGEST), None)  # NaN compares as False
        if bad is not None:
            raise ValueError(f"returned {bad}{', more than float32 holds' * math.isfinite(bad)}")
    except (Exception, SystemExit) as error:  # whatever a user's function may raise
        return Called([0.0] * len(texts), _told(error), said.first_line())
    return Called(values, "", said.first_line())


def _told(error: BaseException) -> str:
    """One line of at most 200 characters."""
    if isinstance(error, SystemExit):
        return f"it called sys.exit({'' if error.code is None else repr(error.code)})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class _Said(io.TextIOBase):
    """Keeps the first line, of at most 200 characters, of what is written to it."""

    def __init__(self) -> None:
        self.kept = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if len(self.kept) < 200:
            self.kept += text[:200]
        return len(text)

    def first_line(self) -> str:
        return next((line.strip() for line in self.kept.splitlines() if line.strip()), "")[:200]


@contextlib.contextmanager
def _unheard(said: io.TextIOBase | None = None):
    """What Python code writes to stdout and stderr goes to `said`, or nowhere: a display may be drawn there."""
    said = said or _Said()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield
