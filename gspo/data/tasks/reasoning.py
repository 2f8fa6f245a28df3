"""reasoning_gym:<name>: the procedural tasks of the reasoning-gym package, each with its own scorer."""

import dataclasses
import os
import re
from typing import Any

from gspo.data.example import Example
from gspo.data.tasks.task import Task, check_options, check_split, suggest
from gspo.types import UserError

# What the scorer of a data set may be shown; other answers count as wrong. Most of these scorers hand the model's text
# to Python's eval, or to SymPy's parser, which does the same: so no call, attribute or tower of powers fits into what
# they see.
_LITERALS, _ARITHMETIC = r"[\w\s\[\],'\"]*", r"(?!.*\*\s*\*)[0-9\s()+*/-]{,200}"
_READABLE = {
    "binary_matrix": _LITERALS,
    "n_queens": _LITERALS,
    "spiral_matrix": _LITERALS,
    "string_insertion": _LITERALS,
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    # powers of letters, below 100
    "polynomial_multiplication": r"(?!.*[\d\s]\*\s*\*)(?!.*\*\s*\*\s*\d{3})[a-z0-9\s*+-]*",
    "complex_arithmetic": r"[0-9\s.,()ij*+-]*",  # its scorer gives "nan" full marks
    "game_of_life_halting": r"(?!)",  # its scorer gives any text full marks: only the very answer passes
}
# These need brackets and calls, on which SymPy may think for hours; `composite` passes text on to any of the others.
_UNSAFE = ("simple_integration", "intermediate_integration", "composite")
# These build their problems in the order of a Python set, which changes from process to process.
_SET_ORDER = (
    "codeio",
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)
_SEED_STRIDE = (
    1_000_000  # reasoning-gym draws example i of seed s from seed s + i: splits and seeds must lie further apart
)
_MAX_ANSWER = 10_000  # characters
_HUGE_EXPONENT = re.compile(r"[\d._][eE][-+]?[\d_]{4}")  # Fraction("1e999999999") fills the memory


def make(rest: str, *, split: str, seed: int, size: int | None, **options: Any) -> Task:
    """Question and answer of a reasoning-gym data set; options are the fields of its config; scored by its own
    `score_answer`.

    Train and test draw from seeds that never meet; where a data set has few distinct problems they may still repeat
    each other."""
    name = f"reasoning_gym:{rest}"
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(f'task.name={name!r}: needs an optional package: pip install "reasoning-gym>=0.1.19"') from None
    check_split(name, split)
    if rest not in DATASETS:
        raise UserError(f"task.name={name!r}: reasoning-gym has no data set {rest!r}{suggest(rest, DATASETS)}")
    if rest in _UNSAFE:
        raise UserError(
            f"task.name={name!r}: refused, since its scorer evaluates what the model wrote, which may run code or "
            "never return"
        )
    if rest in _SET_ORDER and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise UserError(
            f"task.name={name!r}: depends on the order of Python sets, so no run could be repeated or resumed: "
            "start the program with PYTHONHASHSEED=0"
        )
    config = DATASETS[rest][1]
    check_options(name, options, {field.name for field in dataclasses.fields(config)} - {"seed", "size"})
    size = size or (2_000 if split == "train" else 200)
    if size > _SEED_STRIDE:
        raise UserError(f"task.options.size={size}: more than the {_SEED_STRIDE} examples between two seeds of {name}")
    try:
        dataset = reasoning_gym.create_dataset(
            rest, seed=_SEED_STRIDE * (2 * seed + (split == "test")), size=size, **options
        )
        dataset[0]
    except Exception as error:  # asserts and exceptions of any kind in its checks
        raise UserError(f"task.options: {name} refuses {options}: {str(error) or type(error).__name__}") from None

    def example(index: int) -> Example:
        entry = dataset[index]
        answer = entry["answer"]
        return Example(entry["question"], "" if answer is None else str(answer), metadata=entry)

    def reward(completion: str, example: Example) -> float:
        """The data set's own score in [0, 1] of the text in the last <answer> tags, or of the whole completion."""
        before, closed, _ = completion.rpartition("</answer>")
        answer = (before if closed else completion).rpartition("<answer>")[2].strip()
        known = re.fullmatch(_READABLE.get(rest, ".*"), answer[:_MAX_ANSWER], re.DOTALL)
        allowed = known and len(answer) <= _MAX_ANSWER and not _HUGE_EXPONENT.search(answer)
        if not (allowed or answer == example.answer):
            return 0.0
        try:
            return float(dataset.score_answer(answer, example.metadata))
        except Exception:
            return 0.0  # a scorer that trips over a text has not found the answer in it

    return Task(name, size, example, reward)
