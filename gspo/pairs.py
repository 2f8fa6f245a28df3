"""Preferences on the devices, and how well a model agrees with those that were held out: what training a reward model
and DPO share.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from gspo import plans
from gspo.data.preferences import PairSource, make_preferences
from gspo.data.tokenizer import Tokenizer
from gspo.generate import check_splits
from gspo.learning.rewards import PAIR, CompletionRows
from gspo.parallel import distributed
from gspo.parallel.sharding import Layout
from gspo.resume import tokenizer_of_run
from gspo.steps import check_rows, make_layout
from gspo.supervised_plans import PairPlan

BINS = 10  # of the calibration table
Z = 1.96  # of a 95% interval
SHOWN = (  # of the display
    ("held-out accuracy", "eval/accuracy", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("rewards right", "rewards/accuracies", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
)


def pair_source(plan: plans.DataPlan, split: str, tokenizer: Tokenizer) -> PairSource:
    return PairSource(
        make_preferences(plan.task, split=split, seed=plan.seed, **plan.options),
        tokenizer,
        max_prompt_length=plan.max_prompt_length,
        max_completion_length=plan.max_completion_length,
        overlong=plan.overlong_prompts,
        seed=plan.seed,
        system_prompt=plan.system_prompt,
    )


class Prepared(NamedTuple):
    """Where a training on preferences runs, and its data. notes: lines for the log."""

    layout: Layout
    tokenizer: Tokenizer
    source: PairSource
    held_out: PairSource
    notes: list[str]


def prepare(plan: PairPlan) -> Prepared:
    """Raises UserError where pairs cannot be cut evenly over the devices, and for what is wrong with the data."""
    layout, tokenizer = make_layout(plan.mesh), tokenizer_of_run(plan)
    check_rows(layout, batch_size=plan.batch_size)
    if plan.update.micro_batch_size:
        check_rows(layout, **{"pairs of a micro-batch (micro_batch_size / 2)": plan.update.micro_batch_size // PAIR})
    notes = check_splits(plan.data)
    source, held_out = (pair_source(plan.data, s, tokenizer) for s in (plan.data.train_split, plan.data.eval_split))
    notes += [*source.notes, *(f"held out: {note}" for note in held_out.notes)]
    return Prepared(layout, tokenizer, source, held_out, notes)


def make_pairs(layout: Layout, source: PairSource, cursor: int, count: int) -> CompletionRows:
    """`count` pairs as 2 · count rows, each process reading its own."""
    rows = layout.sharding("rows")
    local_B = distributed.local_rows(rows, PAIR * count)
    batch = source.batch(cursor, count, local_B[::PAIR] // PAIR)
    frames = batch.rows
    arrays = (frames.tokens_BT, frames.prompt_lengths_B, frames.completion_lengths_B, batch.margins_B)
    return CompletionRows(*distributed.put_rows(rows, local_B, PAIR * count, *arrays))


def score_all(
    layout: Layout, source: PairSource, count: int, at_a_time: int, score: Callable[[CompletionRows], jax.Array]
) -> np.ndarray:
    """[count, 2] float64: the scores of the chosen and the rejected texts of the first `count` pairs of the source's
    order. Equal calls, one compile: what the last has too many is dropped."""
    scores = [distributed.fetch(score(make_pairs(layout, source, at, at_a_time))) for at in range(0, count, at_a_time)]
    return np.concatenate(scores).astype(np.float64).reshape(-1, PAIR)[:count]


def evaluated(plan: PairPlan, parts: Prepared, score: Callable[[CompletionRows], jax.Array]) -> dict[str, Any]:
    """The agreement with the first eval.num_prompts pairs that were held out."""
    count = min(plan.evaluation.num_prompts, len(parts.held_out))
    scores_Q2 = score_all(parts.layout, parts.held_out, count, plan.batch_size, score)
    return agreement(scores_Q2[:, 0] - scores_Q2[:, 1])


def agreement(difference_Q: np.ndarray) -> dict[str, Any]:
    """How well the differences of two scores, chosen less rejected, predict what was preferred.

    eval/accuracy with eval/accuracy_low and _high, Wilson's interval of 95%; a tie counts as half. eval/loss: the mean
    of −log σ(difference). eval/margin: the mean difference. The lists eval/calibration_*: the share of pairs in which
    the model was right, by its confidence, the probability σ(|difference|) that it gives to its own preference, in
    equal bins from 0.5 to 1 (None where nothing fell). eval/ece: the mean distance of the two.
    """
    right_Q = (np.sign(difference_Q) + 1) / 2
    confidence_Q = 1 / (1 + np.exp(-np.abs(difference_Q)))
    low, high = wilson(float(right_Q.sum()), len(right_Q))
    bin_Q = np.minimum(((confidence_Q - 0.5) * 2 * BINS).astype(int), BINS - 1)
    counts = np.bincount(bin_Q, minlength=BINS)
    means = [np.bincount(bin_Q, x_Q, BINS) / np.maximum(counts, 1) for x_Q in (confidence_Q, right_Q)]
    stated, found = ([float(m) if n else None for m, n in zip(mean, counts, strict=True)] for mean in means)
    return {
        "eval/accuracy": float(right_Q.mean()),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/loss": float(np.logaddexp(0, -difference_Q).mean()),
        "eval/margin": float(difference_Q.mean()),
        "eval/ece": float(np.sum(counts * np.abs(means[0] - means[1])) / len(right_Q)),
        "eval/calibration_count": counts.tolist(),
        "eval/calibration_confidence": stated,
        "eval/calibration_accuracy": found,
    }


def wilson(successes: float, count: int) -> tuple[float, float]:
    """The interval of 95% of a share of `count`, Wilson (1927): inside of [0, 1], and not empty at its ends."""
    share, spread = successes / count, Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(centre - half, 0.0) if successes else 0.0, min(centre + half, 1.0) if successes < count else 1.0
