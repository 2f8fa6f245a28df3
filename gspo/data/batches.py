"""Examples to rows: the order of a run, prompts and demonstrations in their frames, completions back to text and
rewards.

A batch is a function of a cursor, the number of examples that the run consumed before it: epoch after epoch, each in
another order, all read by random access. The data state of a checkpoint is that one integer. NumPy only; the loops move
rows to devices."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import grain
import numpy as np
from absl import logging

from gspo.data.example import Example
from gspo.data.rewards import RewardFunction
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
        lengths = np.array([len(tokenizer.prompt_ids(example.prompt)) for example in _examples(task)])
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
        indices = _indices(self._kept, self.seed, cursor, num_prompts)
        longest = max(self._all_lengths[i] for i in indices)
        width = next(width for width in self.widths if width >= longest)
        examples = [self.task[indices[j]] for j in (range(num_prompts) if local_Q is None else local_Q)]
        ids = [self.tokenizer.prompt_ids(example.prompt) for example in examples]
        return PromptBatch(examples, _left_padded(ids, width, self.tokenizer.pad_id), _lengths(ids))


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
            [(len(tokenizer.prompt_ids(ex.prompt)), len(self._completion_ids(ex))) for ex in _examples(task)]
        )
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
        return [*self.tokenizer.encode(example.demonstration), self.tokenizer.eos_ids[0]]

    def batch(self, cursor: int, num_rows: int, local_B: Sequence[int] | None = None) -> DemonstrationBatch:
        """The rows at positions cursor .. cursor + num_rows - 1 of the run. local_B: which of these rows to read."""
        indices = _indices(self._kept, self.seed, cursor, num_rows)
        examples = [self.task[indices[j]] for j in (range(num_rows) if local_B is None else local_B)]
        prompts = [self.tokenizer.prompt_ids(example.prompt) for example in examples]
        completions = [self._completion_ids(example) for example in examples]
        return frames(prompts, completions, self.prompt_width, self.completion_width, self.tokenizer.pad_id)


def frames(
    prompts: list[list[int]], completions: list[list[int]], prompt_width: int, completion_width: int, pad_id: int
) -> DemonstrationBatch:
    """Ids of B prompts and of what follows each of them, in their frames. They have to fit."""
    left_BP = _left_padded(prompts, prompt_width, pad_id)
    right_BC = _left_padded([ids[::-1] for ids in completions], completion_width, pad_id)[:, ::-1]
    return DemonstrationBatch(np.concatenate([left_BP, right_BC], axis=1), _lengths(prompts), _lengths(completions))


def _examples(task: Task):
    return (task[i] for i in range(len(task)))


def _indices(kept: np.ndarray, seed: int, cursor: int, count: int) -> list[int]:
    return [int(kept[shuffled_index(len(kept), seed, cursor + j)]) for j in range(count)]


def _lengths(ids: list[list[int]]) -> np.ndarray:
    return np.array([len(row) for row in ids], np.int32)


def _left_padded(ids: list[list[int]], width: int, pad_id: int) -> np.ndarray:
    rows = np.full((len(ids), width), pad_id, np.int32)
    for row, tokens in zip(rows, ids, strict=True):
        row[width - len(tokens) :] = tokens
    return rows


def _fits(lengths: np.ndarray, limit: int, what: str, field: str, policy: str) -> np.ndarray:
    """Which lengths are within the limit. UserError where the policy is "error" and some are not, or where none is."""
    if policy not in ("error", "drop"):
        raise UserError(f"overlong_prompts={policy!r} should be 'error' or 'drop'")
    fits = lengths <= limit
    over, longest = int((~fits).sum()), int(lengths.max())
    count = f"{over} of {len(lengths)} {what} are longer than {field}={limit} tokens (longest {longest})"
    if policy == "error" and not fits.all():
        raise UserError(f"{count}: raise it, or set overlong_prompts='drop'")
    if not fits.any():
        raise UserError(f"{count}, so none is left: raise it")
    return fits


def completion_texts(
    tokenizer: Tokenizer, tokens_BT: np.ndarray, prompt_width: int, lengths_B: np.ndarray
) -> list[str]:
    """The text of each row's completion: `lengths_B` tokens from column `prompt_width` on, special tokens skipped."""
    rows = np.asarray(tokens_BT)[:, prompt_width:].tolist()
    return [tokenizer.decode(row[:length]) for row, length in zip(rows, np.asarray(lengths_B).tolist(), strict=True)]


def score_completions(
    texts: Sequence[str],
    examples: Sequence[Example],
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of B completions, each with its example: (rewards_B, parts_BR), float32.

    parts_BR[:, r] is what functions[r] returned; rewards_B is the sum of the parts, weighted (weights default to 1). A
    function that raises, or returns what is no finite number, counts as 0 for that completion and is named in the log:
    one odd completion does not end a run, but a reward that fails often will be seen.
    """
    weights = [1.0] * len(functions) if weights is None else weights
    if len(weights) != len(functions):
        raise UserError(f"reward_weights has {len(weights)} numbers for {len(functions)} rewards: give one for each")
    parts_BR = np.zeros((len(texts), len(functions)), np.float32)
    for r, function in enumerate(functions):
        parts_BR[:, r] = _score(function, texts, examples)
    return parts_BR @ np.asarray(weights, np.float32), parts_BR


def _score(function: Callable[[str, Example], float], texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
    scores, failures = [], []
    for text, example in zip(texts, examples, strict=True):
        try:
            score = float(function(text, example))
            if not np.isfinite(score):
                raise ValueError(f"returned {score}")
        except Exception as error:  # whatever a user's function may raise
            score = 0.0
            failures.append(error)
        scores.append(score)
    if failures:
        logging.warning(
            "reward %s failed on %d of %d completions, which count as 0: %r",
            getattr(function, "__name__", function),
            len(failures),
            len(texts),
            failures[0],
        )
    return scores
