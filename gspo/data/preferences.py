"""Preferences: a prompt and two texts that continue it, one of which somebody preferred to the other.

    jsonl:<path>     lines {"prompt", "chosen", "rejected"} and, where there is one, "margin"; {split} in the path
    tfds:<name>      a prepared tensorflow-datasets folder with such fields
    running_sum      the toy of `gspo.data.tasks`: the right answer is preferred to a demonstration with an error in it

A prompt is a text, or a list of one user message; a completion is a text, or a list of messages of which the
last is the assistant's: the forms in which TRL and the data sets on the Hub have them. `PairSource` makes frames of
them: two rows for each pair, the preferred one first. So they are groups of two completions to a prompt, which runs
once for both.

What cannot teach anything is left out and counted (`PairSource.notes`); what can only be a mistake is a UserError.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gspo.data.batches import DemonstrationBatch, check_overlong, frames, indices_at
from gspo.data.example import Example, prompt_of, with_system_prompt
from gspo.data.tasks import jsonl, running_sum, tfds
from gspo.data.tasks.task import check_options, first, suggest
from gspo.data.tokenizer import Tokenizer
from gspo.types import UserError

FIELDS = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Preference:
    """margin: by how much the chosen text is better, >= 0, on the scale of whoever rated it; 0 where nobody did."""

    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Preferences:
    """`preferences[i]` for 0 <= i < len(preferences)."""

    name: str
    size: int
    pair: Callable[[int], Preference]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Preference:
        return self.pair(int(index))


# ---------------------------------------------------------------------------------------------------- kinds of data


def make_preferences(name: str, *, split: str, seed: int = 0, size: int | None = None, **options: Any) -> Preferences:
    """The pairs of that name. `size` limits them to the first ones. Raises UserError."""
    kind, _, rest = name.partition(":")
    if kind not in KINDS or bool(rest) != (kind != "running_sum"):
        known = ["jsonl:<path>", "tfds:<name>", "running_sum"]
        raise UserError(f"task.name={name!r}: no preferences of that name; there are {', '.join(known)}")
    if size is not None and size < 1:
        raise UserError(f"task.options.size={size}: {name} would be an empty data set; give 1 or more")
    make, handed_on = KINDS[kind]
    parameters = inspect.signature(make).parameters | inspect.signature(handed_on).parameters
    check_options(name, options, parameters.keys() - OWN)
    found = make(rest, split=split, seed=seed, size=size, **options)
    if len(found) == 0:
        raise UserError(f"task.name={name!r}: split {split!r} is an empty data set")
    return found


def _jsonl(rest: str, *, split: str, seed: int, size: int | None, **fields: str) -> Preferences:
    pairs = [preference_of(row, where, **fields) for row, where in jsonl.rows_of(rest, split, size)]
    return Preferences(f"jsonl:{rest}", first(f"jsonl:{rest}", len(pairs), size), pairs.__getitem__)


def _tfds(
    rest: str, *, split: str, seed: int, size: int | None, data_dir: str | None = None, **fields: str
) -> Preferences:
    name, rows = f"tfds:{rest}", tfds.open_split(rest, split, data_dir)

    def pair(index: int) -> Preference:
        row = {key: value.decode() if isinstance(value, bytes) else value for key, value in rows[index].items()}
        return preference_of(row, f"{name}, split {split!r}, row {index}", **fields)

    return Preferences(name, first(name, len(rows), size), pair)


def _running_sum(rest: str, *, split: str, seed: int, size: int | None, **options: Any) -> Preferences:
    """A known truth: the text with the right answer is the better one. A demonstrator that makes no error gives a pair
    of equal texts, which is left out and counted as such."""
    task = running_sum.make(rest, split=split, seed=seed, size=size or (20_000 if split == "train" else 2_000),
                            **options)  # fmt: skip

    def pair(index: int) -> Preference:
        example = task[index]
        return Preference(example.prompt, example.answer, example.demonstration or "")

    return Preferences("running_sum", len(task), pair)


def preference_of(
    row: Any,
    where: str,
    *,
    prompt_field: str = "prompt",
    chosen_field: str = "chosen",
    rejected_field: str = "rejected",
    margin_field: str = "margin",
) -> Preference:
    """One row of a data set. where: what an error calls it. Raises UserError for what cannot be meant: a field that is
    not there, a text that is none, a margin that says that the rejected text is the better one."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with the fields {', '.join(FIELDS)}, not {type(row).__name__}")
    names = (prompt_field, chosen_field, rejected_field)
    for option, name in zip(FIELDS, names, strict=True):
        if name not in row:
            raise UserError(
                f"{where}: field {name!r} is missing, there are {', '.join(map(repr, row))}{suggest(name, row)}; "
                f"task.options.{option}_field names another one"
            )
    prompt = _text(row[prompt_field], f"{where}: field {prompt_field!r}", "user")
    chosen, rejected = (_completion(row[name], prompt, f"{where}: field {name!r}") for name in names[1:])
    margin = row.get(margin_field)
    if margin is None:
        return Preference(prompt, chosen, rejected)
    if isinstance(margin, bool) or not isinstance(margin, int | float | np.number) or not np.isfinite(margin):
        raise UserError(f"{where}: field {margin_field!r} should be a number, not {margin!r:.40}")
    if margin < 0:
        raise UserError(
            f"{where}: {margin_field!r} is {margin}: the rejected text would be the better one; are "
            f"{chosen_field!r} and {rejected_field!r} exchanged?"
        )
    return Preference(prompt, chosen, rejected, float(margin))


def _text(value: Any, where: str, role: str) -> str:
    """A text, or that of the one message of `role` in a list."""
    if isinstance(value, str):
        return value
    messages = list(value) if isinstance(value, Sequence | np.ndarray) else []
    if len(messages) == 1 and _is_message(messages[0]) and messages[0]["role"] == role:
        return messages[0]["content"]
    if messages and all(map(_is_message, messages)):
        roles = ", ".join(str(message["role"]) for message in messages)
        raise UserError(f"{where}: a conversation of {roles}; only one message of the {role} is understood")
    raise UserError(f"{where}: should be a text, or a list with one message of the {role}, not {value!r:.40}")


def _completion(value: Any, prompt: str, where: str) -> str:
    """What follows the prompt: a text, or the assistant's message, with or without the prompt's message before it."""
    if isinstance(value, str):
        return value
    messages = list(value) if isinstance(value, Sequence | np.ndarray) else []
    if len(messages) == 2 and all(map(_is_message, messages)) and messages[0]["content"] == prompt:
        messages = messages[1:]
    return _text(messages or value, where, "assistant")


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys() and isinstance(value["content"], str)


# Kind of data -> (who makes it, who gets the options that it hands on).
KINDS: dict[str, tuple[Callable[..., Preferences], Callable]] = {
    "jsonl": (_jsonl, preference_of),
    "tfds": (_tfds, preference_of),
    "running_sum": (_running_sum, running_sum.make),
}
OWN = {"rest", "split", "seed", "size", "row", "where", "fields", "options"}  # parameters that are no options


# ---------------------------------------------------------------------------------------------------- frames


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Q pairs as 2 Q rows, int32: row 2 q is the chosen text of pair q, row 2 q + 1 the rejected one. margins_B
    float32: that of the pair, in both of its rows."""

    rows: DemonstrationBatch
    margins_B: np.ndarray


class PairSource:
    """Pairs in their frames, in shuffled order. Both texts end in the tokenizer's first end-of-sequence token, which
    counts towards max_completion_length.

    All pairs are looked at once, here. Pairs that teach nothing (equal texts, an empty prompt or text) are left out.
    overlong: "error" or "drop", for pairs of which the prompt or a text does not fit. Pairs that stand in the data the
    other way round, too, are kept: two people may disagree. system_prompt: what conversations begin with. notes: lines
    for the log, which count them all.
    """

    def __init__(
        self,
        preferences: Preferences,
        tokenizer: Tokenizer,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        overlong: str = "error",
        seed: int = 0,
        system_prompt: str = "",
    ) -> None:
        check_overlong(overlong)
        self.preferences, self.tokenizer, self.seed = preferences, tokenizer, seed
        self.system_prompt = system_prompt
        self.prompt_width, self.completion_width = max_prompt_length, max_completion_length
        left_out: dict[str, list[int]] = {}
        seen: dict[tuple[str, str, str], int] = {}
        kept, exchanged = [], []
        for i in range(len(preferences)):
            pair = preferences[i]
            why = self._why_not(pair)
            if why:
                left_out.setdefault(why, []).append(i)
                continue
            kept.append(i)
            seen[pair.prompt, pair.chosen, pair.rejected] = i
            if (pair.prompt, pair.rejected, pair.chosen) in seen:
                exchanged.append(i)
        long = [f"{_counted(found)} {why}" for why, found in left_out.items() if "longer" in why]
        if long and overlong == "error":
            raise UserError(f"{preferences.name}: {'; '.join(long)}: raise them, or set overlong_prompts='drop'")
        told = ", ".join(f"{_counted(found)} {why}" for why, found in left_out.items())
        if not kept:
            raise UserError(f"task.name={preferences.name!r}: none of its {len(preferences)} pairs can be used: {told}")
        self._kept = np.array(kept)
        self.notes = [f"{len(preferences) - len(kept)} of {len(preferences)} pairs left out: {told}"] if told else []
        if exchanged:
            self.notes.append(
                f"warning: {_counted(exchanged)} in the data the other way round too, chosen and rejected exchanged: "
                "some labels may be swapped"
            )

    def __len__(self) -> int:
        """Pairs in one epoch: those that were kept."""
        return len(self._kept)

    def _why_not(self, pair: Preference) -> str:
        if not (pair.prompt.strip() and pair.chosen.strip() and pair.rejected.strip()):
            return "with an empty text"
        if pair.chosen == pair.rejected:
            return "with equal texts"
        prompt, *completions = self._ids(pair)
        if len(prompt) > self.prompt_width:
            return f"with a prompt longer than max_prompt_length={self.prompt_width}"
        if max(map(len, completions)) > self.completion_width:
            return f"with a text longer than max_completion_length={self.completion_width}"
        return ""

    def _ids(self, pair: Preference) -> tuple[list[int], list[int], list[int]]:
        encode, end = self.tokenizer.encode, self.tokenizer.end_id
        example = Example(pair.prompt, answer="")
        example = with_system_prompt(example, self.system_prompt) if self.system_prompt else example
        prompt = self.tokenizer.prompt_ids(prompt_of(example))
        return prompt, [*encode(pair.chosen), end], [*encode(pair.rejected), end]

    def batch(self, cursor: int, num_pairs: int, local_Q: Sequence[int] | None = None) -> PairBatch:
        """The pairs at positions cursor .. cursor + num_pairs - 1 of the run. local_Q: which of these to read."""
        indices = indices_at(self._kept, self.seed, cursor, num_pairs)
        pairs = [self.preferences[indices[q]] for q in (range(num_pairs) if local_Q is None else local_Q)]
        ids = [self._ids(pair) for pair in pairs]
        prompts = [prompt for prompt, *_ in ids for _ in range(2)]
        completions = [completion for _, *both in ids for completion in both]
        rows = frames(prompts, completions, self.prompt_width, self.completion_width, self.tokenizer.pad_id)
        return PairBatch(rows, np.repeat(np.array([pair.margin for pair in pairs], np.float32), 2))


def _counted(indices: list[int]) -> str:
    """ "3 (pairs 4, 17, 60)"."""
    shown = ", ".join(map(str, indices[:3])) + (", ..." if len(indices) > 3 else "")
    return f"{len(indices)} (pair{'s' * (len(indices) > 1)} {shown})"
