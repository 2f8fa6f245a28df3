"""Examples to rows: the order of a run, prompts and demonstrations in their frames, completions back to text.

A batch is a function of a cursor, the number of examples that the run consumed before it: epoch after epoch, each in
another order, all read by random access. The data state of a checkpoint is that one integer. NumPy only; the loops move
rows to devices."""

import bisect
import dataclasses
import functools
from collections.abc import Sequence

import grain
import numpy as np

from gspo.data.example import Example, prompt_of
from gspo.data.tasks import Task
from gspo.data.tokenizer import Tokenizer
from gspo.types import UserError


def shuffled_index(size: int, seed: int, position: int) -> int:
    """The index at `position` of the endless sequence of epochs over range(size), each epoch a new permutation
    (Grain's)."""
    return _shuffled(int(size), seed % 2**32)[int(position)]


@functools.lru_cache(maxsize=64)
def _shuffled(size: int, seed: int) -> grain.MapDataset:
    return grain.MapDataset.range(size).shuffle(seed=seed).repeat()


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Q prompts, or those of them that a process asked for. tokens_QP int32, left-padded; lengths_Q int32, without the
    padding."""

    examples: list[Example]
    tokens_QP: np.ndarray
    lengths_Q: np.ndarray


@dataclasses.dataclass(frozen=True)
class DemonstrationBatch:
    """B frames of prompt and demonstration, int32; completion_lengths_B counts the end-of-sequence token."""

    tokens_BT: np.ndarray
    prompt_lengths_B: np.ndarray
    completion_lengths_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """B rows that hold several demonstrations each, one behind the other from column 0 on. tokens_BT int32; segments_BT
    int32: the number of the demonstration in its row, -1 behind the last; completion_BT bool: the tokens that are
    imitated; used_B int32: columns before the padding. next_cursor: of the demonstrations that follow."""

    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    completion_BT: np.ndarray
    used_B: np.ndarray
    next_cursor: int


class PromptSource:
    """The prompts of a task, tokenized, in shuffled order.

    All prompts are measured once, here, so that a prompt which does not fit is found before the run and not in its
    third hour.
    overlong_prompts  "error" (UserError with the counts) or "drop" (`num_dropped` tells how many)
    prompt_buckets    frame widths to choose from, smallest first that holds the batch; each is one compilation. ()
                      means always max_prompt_length.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        *,
        max_prompt_length: int,
        overlong_prompts: str = "error",
        seed: int = 0,
        prompt_buckets: Sequence[int] = (),
    ) -> None:
        bad = [width for width in prompt_buckets if not 1 <= width <= max_prompt_length]
        if bad:
            raise UserError(f"prompt_buckets: {bad[0]} is not between 1 and max_prompt_length={max_prompt_length}")
        self.task, self.tokenizer, self.seed = task, tokenizer, seed
        self.widths = sorted({*prompt_buckets, max_prompt_length})
        lengths = np.array([len(tokenizer.prompt_ids(prompt_of(example))) for example in _examples(task)])
        if not lengths.all():
            raise UserError(
                f"example {int(lengths.argmin())} of task {task.name} has an empty prompt: nothing to continue from"
            )
        fits = _fits(lengths, max_prompt_length, "prompts", "max_prompt_length", overlong_prompts)
        self._kept, self._all_lengths = np.flatnonzero(fits), lengths
        self.num_dropped = len(task) - len(self._kept)

    def __len__(self) -> int:
        """Prompts in one epoch: those that were kept."""
        return len(self._kept)

    def batch(self, cursor: int, num_prompts: int, local_Q: Sequence[int] | None = None) -> PromptBatch:
        """The prompts at positions cursor .. cursor + num_prompts - 1 of the run. local_Q: which of these num_prompts
        to read; the width of the frame is that of all of them.
        """
        indices = indices_at(self._kept, self.seed, cursor, num_prompts)
        longest = max(self._all_lengths[i] for i in indices)
        width = next(width for width in self.widths if width >= longest)
        examples = [self.task[indices[j]] for j in (range(num_prompts) if local_Q is None else local_Q)]
        ids = [self.tokenizer.prompt_ids(prompt_of(example)) for example in examples]
        return PromptBatch(examples, left_padded(ids, width, self.tokenizer.pad_id), _lengths(ids))


class DemonstrationSource:
    """Prompts with their demonstrations as whole frames, in shuffled order: the rows of supervised fine-tuning.

    A demonstration ends in the tokenizer's first end-of-sequence token, which counts towards max_completion_length.
    `overlong`: "error" or "drop", for prompts and demonstrations alike (a demonstration cut short would teach the
    policy not to end)."""

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        overlong: str = "error",
        seed: int = 0,
    ) -> None:
        self.task, self.tokenizer, self.seed = task, tokenizer, seed
        self.prompt_width, self.completion_width = max_prompt_length, max_completion_length
        lengths = np.array(
            [(len(tokenizer.prompt_ids(prompt_of(ex))), len(self._completion_ids(ex))) for ex in _examples(task)]
        )
        self._sizes = lengths.sum(axis=1)
        self._kept = np.flatnonzero(
            _fits(lengths[:, 0], max_prompt_length, "prompts", "max_prompt_length", overlong)
            & _fits(lengths[:, 1], max_completion_length, "demonstrations", "max_completion_length", overlong)
        )
        if len(self._kept) == 0:
            raise UserError(
                f"no example of task {task.name} fits max_prompt_length={max_prompt_length} and "
                f"max_completion_length={max_completion_length} tokens together: raise them"
            )
        self.num_dropped = len(task) - len(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def _completion_ids(self, example: Example) -> list[int]:
        if example.demonstration is None:
            raise UserError(
                f"task {self.task.name} has no demonstrations, which supervised fine-tuning imitates "
                f"(the prompt {example.prompt[:40]!r} has none)"
            )
        return [*self.tokenizer.encode(example.demonstration), self.tokenizer.end_id]

    def batch(self, cursor: int, num_rows: int, local_B: Sequence[int] | None = None) -> DemonstrationBatch:
        """The rows at positions cursor .. cursor + num_rows - 1 of the run. local_B: which of these rows to read."""
        indices = indices_at(self._kept, self.seed, cursor, num_rows)
        examples = [self.task[indices[j]] for j in (range(num_rows) if local_B is None else local_B)]
        prompts = [self.tokenizer.prompt_ids(prompt_of(example)) for example in examples]
        completions = [self._completion_ids(example) for example in examples]
        return frames(prompts, completions, self.prompt_width, self.completion_width, self.tokenizer.pad_id)

    def packed(self, cursor: int, num_rows: int, local_B: Sequence[int] | None = None) -> PackedBatch:
        """As many demonstrations from position `cursor` on as find room in so many rows of a frame's width: each goes
        to the first row that has it, and the first that finds none begins the next batch. local_B: which of the rows to
        read."""
        width = self.prompt_width + self.completion_width
        rows, room = [[] for _ in range(num_rows)], [width] * num_rows
        while True:
            (index,) = indices_at(self._kept, self.seed, cursor, 1)
            fitting = next((row for row in range(num_rows) if room[row] >= self._sizes[index]), None)
            if fitting is None:
                break
            rows[fitting].append(index)
            room[fitting] -= self._sizes[index]
            cursor += 1
        local = [rows[j] for j in (range(num_rows) if local_B is None else local_B)]
        tokens_BT = np.full((len(local), width), self.tokenizer.pad_id, np.int32)
        segments_BT, completion_BT = np.full_like(tokens_BT, -1), np.zeros(tokens_BT.shape, bool)
        used_B = np.zeros(len(local), np.int32)
        for b, indices in enumerate(local):
            for segment, example in enumerate(self.task[index] for index in indices):
                prompt, completion = self.tokenizer.prompt_ids(prompt_of(example)), self._completion_ids(example)
                if not prompt:
                    raise UserError("packing: a demonstration has an empty prompt: nothing to continue from")
                columns = slice(used_B[b], used_B[b] + len(prompt) + len(completion))
                tokens_BT[b, columns], segments_BT[b, columns] = prompt + completion, segment
                completion_BT[b, columns.start + len(prompt) : columns.stop] = True
                used_B[b] = columns.stop
        return PackedBatch(tokens_BT, segments_BT, completion_BT, used_B, cursor)


def frames(
    prompts: list[list[int]], completions: list[list[int]], prompt_width: int, completion_width: int, pad_id: int
) -> DemonstrationBatch:
    """Ids of B prompts and of what follows each of them, in their frames. They have to fit."""
    left_BP = left_padded(prompts, prompt_width, pad_id)
    right_BC = left_padded([ids[::-1] for ids in completions], completion_width, pad_id)[:, ::-1]
    return DemonstrationBatch(np.concatenate([left_BP, right_BC], axis=1), _lengths(prompts), _lengths(completions))


def _examples(task: Task):
    return (task[i] for i in range(len(task)))


def indices_at(kept: np.ndarray, seed: int, cursor: int, count: int) -> list[int]:
    """Which examples stand at positions cursor .. cursor + count - 1 of a run that shuffles those in `kept`."""
    return [int(kept[shuffled_index(len(kept), seed, cursor + j)]) for j in range(count)]


def _lengths(ids: list[list[int]]) -> np.ndarray:
    return np.array([len(row) for row in ids], np.int32)


def left_padded(ids: list[list[int]], width: int, pad_id: int) -> np.ndarray:
    """[rows, width] int32: ids of unequal lengths, none longer than `width`, each at the right end of its row."""
    rows = np.full((len(ids), width), pad_id, np.int32)
    for row, tokens in zip(rows, ids, strict=True):
        row[width - len(tokens) :] = tokens
    return rows


def check_overlong(policy: str) -> None:
    if policy not in ("error", "drop"):
        raise UserError(f"overlong_prompts={policy!r} should be 'error' or 'drop'")


def _fits(lengths: np.ndarray, limit: int, what: str, field: str, policy: str) -> np.ndarray:
    """Which lengths are within the limit. UserError where the policy is "error" and some are not, or where none is."""
    check_overlong(policy)
    fits = lengths <= limit
    over, longest = int((~fits).sum()), int(lengths.max())
    count = f"{over} of {len(lengths)} {what} are longer than {field}={limit} tokens (longest {longest})"
    if policy == "error" and not fits.all():
        raise UserError(f"{count}: raise it, or set overlong_prompts='drop'")
    if not fits.any():
        raise UserError(f"{count}, so none is left: raise it")
    return fits


def completion_texts(
    tokenizer: Tokenizer, tokens_BT: np.ndarray, prompt_width: int, lengths_B: np.ndarray, stop: Sequence[str] = ()
) -> list[str]:
    """The text of each row's completion: `lengths_B` tokens from column `prompt_width` on, special tokens skipped, cut
    after the first of the stop strings in it."""
    rows = np.asarray(tokens_BT)[:, prompt_width:].tolist()
    texts = [tokenizer.decode(row[:length]) for row, length in zip(rows, np.asarray(lengths_B).tolist(), strict=True)]
    return [text[: end_of_stop(text, stop)] for text in texts]


def end_of_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop strings ends in a text; None where there is none of them."""
    return min((at + len(string) for string in stop if (at := text.find(string)) >= 0), default=None)


def stopped_lengths(
    tokenizer: Tokenizer, tokens_BT: np.ndarray, prompt_width: int, lengths_B: np.ndarray, stop: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """[B] int32: the lengths of completions that end with the first token after which their text contains one of the
    stop strings; as given where it contains none. [B] bool: which contain one.

    The tokens decide, by what they decode to, since a stop string may begin and end in the middle of one. A text that
    contains it goes on containing it as tokens are added, so the first such token is found by bisection."""
    new_B, stopped_B = np.array(lengths_B, np.int32), np.zeros(len(lengths_B), bool)
    for b, row in enumerate(np.asarray(tokens_BT)[:, prompt_width:].tolist()):
        ids = row[: new_B[b]]
        if end_of_stop(tokenizer.decode(ids), stop) is not None:
            counts = range(1, len(ids) + 1)
            stopped_B[b] = True
            new_B[b] = 1 + bisect.bisect_left(
                counts, True, key=lambda n, ids=ids: end_of_stop(tokenizer.decode(ids[:n]), stop) is not None
            )
    return new_B, stopped_B
