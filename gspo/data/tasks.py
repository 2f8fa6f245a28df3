"""Tasks: examples by integer index, each a pure function of (split, seed, index).

    running_sum            a toy whose demonstrator errs at a known rate, so that the pass@1 of a cold start is known in
                           advance
    reasoning_gym:<name>   the procedural tasks of the reasoning-gym package, each with its own scorer (an optional
                           extra)
    tfds:<name>            a prepared tensorflow-datasets folder, read without TensorFlow; gsm8k is understood field by
                           field
    jsonl:<path>           one JSON object per line with "prompt" and "answer", and "demonstration" where there is one

Nothing is shuffled here: the order of a run is `batches.shuffled_index`. A new kind of task is a function that returns
a `Task` and a line in `TASKS`; its keyword arguments are the options that a config may set.
"""

import dataclasses
import difflib
import inspect
import itertools
import json
import os
import random
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gspo.data.rewards import Example, RewardFunction, exact_match, hash_answer, numeric_answer
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


def make_task(name: str, *, split: str, seed: int = 0, size: int | None = None, **options: Any) -> Task:
    """The task of that name. `size` limits it to the first examples; procedural tasks are as long as `size` says."""
    kind, _, rest = name.partition(":")
    if kind not in TASKS or bool(rest) != (kind != "running_sum"):
        known = ["running_sum", "reasoning_gym:<name>", "tfds:gsm8k", "jsonl:<path>"]
        raise UserError(f"unknown task {name!r}: there are {', '.join(known)}{_suggest(name, known)}")
    if size is not None and size < 1:
        raise UserError(f"task {name} with size={size} is an empty data set: give a size of 1 or more")
    build = TASKS[kind]
    parameters = inspect.signature(build).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        _check_options(name, options, [p.name for p in parameters if p.name not in ("rest", "split", "seed", "size")])
    task = build(rest, split=split, seed=seed, size=size, **options)
    if len(task) == 0:
        raise UserError(f"task {name}, split {split!r} is an empty data set")
    return task


def _suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_options(name: str, options: Iterable[str], known: Iterable[str]) -> None:
    known = sorted(known)
    for option in options:
        if option not in known:
            names = ", ".join(known) or "none"
            raise UserError(f"task {name} has no option {option!r} (it has {names}){_suggest(option, known)}")


def _check_split(name: str, split: str) -> None:
    if split not in ("train", "test"):
        raise UserError(f"task {name} has the splits 'train' and 'test', not {split!r}")


def _first(name: str, available: int, size: int | None) -> int:
    if size is not None and size > available:
        raise UserError(f"task {name}: size={size} is more than its {available} examples")
    return available if size is None else size


# ---------------------------------------------------------------------------- running_sum


def _running_sum(
    rest: str,
    *,
    split: str,
    seed: int,
    size: int | None,
    num_digits: int = 12,
    modulus: int = 10,
    error_rate: float = 0.12,
) -> Task:
    """Prompt "314=", answer "348": the running sums of the digits modulo `modulus`, one character each.

    The demonstrator writes a uniform wrong digit with probability `error_rate` at each step and goes on from what it
    wrote. A policy that imitates it perfectly is therefore right with probability (1 - error_rate) ** num_digits, and
    its errors are not a matter of what it can represent: a cold start of known pass@1. No prompt is in both splits: its
    checksum decides."""
    _check_split("running_sum", split)
    for field, value, good in (
        ("num_digits", num_digits, num_digits >= 1),
        ("modulus", modulus, 2 <= modulus <= 10),
        ("error_rate", error_rate, 0 <= error_rate <= 1),
    ):
        if not good:
            ranges = "num_digits >= 1, modulus 2..10, error_rate 0..1"
            raise UserError(f"task running_sum: {field}={value} is out of range ({ranges})")

    def example(index: int) -> Example:
        rng = random.Random(f"{seed}/{split}/{index}")  # a string seeds through SHA-512: the same on every machine
        for _ in range(10_000):
            digits = f"{rng.randrange(10**num_digits):0{num_digits}d}"
            if (zlib.crc32(digits.encode()) % 8 == 0) == (split == "test"):
                break
        else:
            raise UserError(
                f"task running_sum with num_digits={num_digits} has too few prompts for a {split} split of its own: "
                "use 3 digits or more"
            )
        right = written = 0
        answer, demonstration = [], []
        for digit in map(int, digits):
            right, written = (right + digit) % modulus, (written + digit) % modulus
            if rng.random() < error_rate:
                written = (written + rng.randrange(1, modulus)) % modulus
            answer.append(str(right))
            demonstration.append(str(written))
        return Example(f"{digits}=", "".join(answer), "".join(demonstration))

    example(0)  # so that too few digits are an error now
    return Task("running_sum", size or (40_000 if split == "train" else 2_000), example, exact_match)


# ---------------------------------------------------------------------------- reasoning_gym

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


def _reasoning_gym(rest: str, *, split: str, seed: int, size: int | None, **options: Any) -> Task:
    """Question and answer of a reasoning-gym data set; options are the fields of its config; scored by its own
    `score_answer`.

    Train and test draw from seeds that never meet; where a data set has few distinct problems they may still repeat
    each other."""
    name = f"reasoning_gym:{rest}"
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(f'task {name} needs an optional package: pip install "reasoning-gym>=0.1.19"') from None
    _check_split(name, split)
    if rest not in DATASETS:
        raise UserError(f"reasoning-gym has no data set {rest!r}{_suggest(rest, DATASETS)}")
    if rest in _UNSAFE:
        raise UserError(
            f"task {name} is refused: its scorer evaluates what the model wrote, which may run code or never return"
        )
    if rest in _SET_ORDER and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise UserError(
            f"task {name} depends on the order of Python sets, so no run could be repeated or resumed: "
            "start the program with PYTHONHASHSEED=0"
        )
    config = DATASETS[rest][1]
    _check_options(name, options, {field.name for field in dataclasses.fields(config)} - {"seed", "size"})
    size = size or (2_000 if split == "train" else 200)
    if size > _SEED_STRIDE:
        raise UserError(f"task {name}: size={size} is more than the {_SEED_STRIDE} examples between two seeds")
    try:
        dataset = reasoning_gym.create_dataset(
            rest, seed=_SEED_STRIDE * (2 * seed + (split == "test")), size=size, **options
        )
        dataset[0]
    except Exception as error:  # asserts and exceptions of any kind in its checks
        raise UserError(f"task {name} refuses its options {options}: {str(error) or type(error).__name__}") from None

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


# ---------------------------------------------------------------------------- tfds


def _tfds(
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
        raise UserError(f"task {name}: answer_format={answer_format!r} should be 'hash' or 'free'")
    if rest != "gsm8k" and not (prompt_field and answer_field):
        raise UserError(f"task {name} needs the options prompt_field and answer_field (only tfds:gsm8k knows its own)")
    source = _tfds_source(rest, split, data_dir)

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
            raise UserError(f"task {name} has no field {error.args[0]!r}: it has {', '.join(sorted(row))}") from None

    if rest == "gsm8k":
        return Task(name, _first(name, len(source), size), gsm8k, formats[answer_format])
    return Task(name, _first(name, len(source), size), other, exact_match)


def _tfds_source(name: str, split: str, data_dir: str | None) -> Any:
    """The random-access source of a prepared data set. Nothing is ever downloaded from here."""
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
            f"no data set {name} in {folder}: set TFDS_DATA_DIR (or the option data_dir) to the folder that holds "
            f"it, or prepare it there once with: {prepare}"
        )
    try:
        builder = tfds.builder(name, data_dir=folder)
        if builder.info.splits[split].num_examples == 0:
            return []
        source = builder.as_data_source(split=split)
        source[0]  # opens the files
        return source
    except ValueError as error:
        raise UserError(f"task tfds:{name}: {str(error).splitlines()[0]}") from None
    except Exception as error:
        raise UserError(
            f"the data set {name} in {folder} cannot be read ({str(error).splitlines()[0]}): prepare it again with: "
            f"{prepare}"
        ) from None


# ---------------------------------------------------------------------------- jsonl


def _jsonl(rest: str, *, split: str, seed: int, size: int | None) -> Task:
    """The lines of a file; "{split}" in the path is replaced by the split, and without it all splits are the same file.

    "prompt" and "answer" must be there; "demonstration" may be; the other fields become the example's metadata.
    """
    path = Path(rest.replace("{split}", split))
    if not path.is_file():
        raise UserError(f"task jsonl: there is no file {path}")
    examples = []
    with path.open("rb") as lines:
        for number, line in enumerate(itertools.islice(lines, size), start=1):
            examples.append(_jsonl_example(line, f"{path}:{number}"))
    return Task(f"jsonl:{rest}", _first(f"jsonl:{rest}", len(examples), size), examples.__getitem__, exact_match)


def _jsonl_example(line: bytes, where: str) -> Example:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the fields 'prompt' and 'answer', not {type(row).__name__}")
    row = {key: str(value) if key == "answer" and type(value) in (int, float) else value for key, value in row.items()}
    for field in ("prompt", "answer", "demonstration"):
        if field not in row and field != "demonstration":
            raise UserError(f"{where}: field {field!r} is missing{_suggest(field, row)}")
        if field in row and not (isinstance(row[field], str) and (row[field] or field == "answer")):
            raise UserError(f"{where}: field {field!r} should be a text that is not empty, not {row[field]!r:.40}")
    prompt, answer, demonstration = row.pop("prompt"), row.pop("answer"), row.pop("demonstration", None)
    return Example(prompt, answer, demonstration, row or None)


TASKS: dict[str, Callable[..., Task]] = {
    "running_sum": _running_sum,
    "reasoning_gym": _reasoning_gym,
    "tfds": _tfds,
    "jsonl": _jsonl,
}
