"""Sampled completions with their rewards: what collecting experience and evaluating share.

Each process reads the prompts, and judges the completions, whose rows lie on its own devices (`local_B`); the rewards
of all rows are then known to all.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gspo import plans
from gspo.data import batches, tasks
from gspo.data.example import Example
from gspo.data.scoring import Scorer
from gspo.data.tokenizer import Tokenizer
from gspo.parallel import distributed
from gspo.parallel.sharding import Layout
from gspo.types import Params, Rollout


def make_task(plan: plans.DataPlan, split: str) -> tasks.Task:
    return tasks.make_task(plan.task, split=split, seed=plan.seed, system_prompt=plan.system_prompt, **plan.options)


def check_splits(plan: plans.DataPlan) -> list[str]:
    """Raises UserError where evaluation would read training examples unasked; else what the log should say of it."""
    note = tasks.check_splits(plan.task, train_split=plan.train_split, eval_split=plan.eval_split, **plan.options)
    return [] if note is None else [note]


def prompt_source(plan: plans.DataPlan, split: str, tokenizer: Tokenizer) -> batches.PromptSource:
    return batches.PromptSource(
        make_task(plan, split),
        tokenizer,
        max_prompt_length=plan.max_prompt_length,
        overlong_prompts=plan.overlong_prompts,
        prompt_buckets=plan.prompt_buckets,
        seed=plan.seed,
    )


class Completions(NamedTuple):
    """Completions of Q prompts, B = Q · G rows. `rollout` is on the devices. On the host, of the rows `local_B` that
    lie on this process's devices: their prompts, tokens and lengths.
    """

    rollout: Rollout
    local_B: np.ndarray
    prompts: batches.PromptBatch
    tokens_BT: np.ndarray
    lengths_B: np.ndarray


class Judged(NamedTuple):
    """Completions with their rewards, B = Q · G rows. `rollout` is on the devices. On the host: numbers of all rows;
    examples and texts of the rows `local_B`, which lie on this process's devices.
    """

    rollout: Rollout
    local_B: np.ndarray
    examples: list[Example]
    texts: list[str]
    rewards_B: np.ndarray  # raw: what the reward functions say, weighted
    parts_BR: np.ndarray
    failed_BR: np.ndarray  # where a reward function failed, which counts as 0
    lengths_B: np.ndarray  # of the completions, in tokens
    truncated_B: np.ndarray


class Generator(NamedTuple):
    """Who writes completions: a jitted sampler, the prompts it continues, how many completions each prompt gets, and
    the texts after which a completion ends."""

    layout: Layout
    source: batches.PromptSource
    sampler: Callable[..., Rollout]
    num_generations: int
    stop: tuple[str, ...] = ()

    def __call__(self, params: Params, cursor: int, num_prompts: int, key: jax.Array) -> Completions:
        """Completions of the prompts at positions cursor .. cursor + num_prompts of the run."""
        rows = self.layout.sharding("rows")
        local_Q = distributed.local_rows(rows, num_prompts)
        local_B = rows_of(local_Q, self.num_generations)
        prompts = self.source.batch(cursor, num_prompts, local_Q)
        placed = distributed.put_rows(rows, local_Q, num_prompts, prompts.tokens_QP, prompts.lengths_Q)
        rollout = self.sampler(params, *placed, key)
        tokens_BT, lengths_B = distributed.fetch_rows(local_B, rollout.tokens_BT, rollout.completion_lengths_B)
        if self.stop:
            tokenizer, width = self.source.tokenizer, prompts.tokens_QP.shape[1]
            lengths_B, stopped_B = batches.stopped_lengths(tokenizer, tokens_BT, width, lengths_B, self.stop)
            new = distributed.put_rows(rows, local_B, len(rollout.tokens_BT), lengths_B, stopped_B)
            rollout = shortened(rollout, *new, self.layout, width, tokenizer.pad_id)
        return Completions(rollout, local_B, prompts, tokens_BT, lengths_B)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def shortened(
    rollout: Rollout, lengths_B: jax.Array, stopped_B: jax.Array, layout: Layout, prompt_width: int, pad_id: int
) -> Rollout:
    """The rollout as a sampler would have left it that had ended its rows after so many tokens, and sampled the same
    until then: pads and log-probs of 0 after them, no routes from the last token on, which was then never fed.
    stopped_B: which rows contain what they were to stop at; these were not cut off, even where it was their last token
    that completed it. decode_steps stays what it was."""
    P, T = prompt_width, rollout.tokens_BT.shape[1]
    end_B1 = P + lengths_B[:, None]
    kept_BT = jnp.arange(T) < end_B1
    routes_LBTX = rollout.routes_LBTX
    if routes_LBTX is not None:
        routes_LBTX = jnp.where((jnp.arange(T) < end_B1 - 1)[None, :, :, None], routes_LBTX, -1)
    short = rollout.replace(
        tokens_BT=jnp.where(kept_BT, rollout.tokens_BT, pad_id),
        completion_lengths_B=lengths_B,
        logp_BC=jnp.where(kept_BT[:, P:], rollout.logp_BC, 0.0),
        routes_LBTX=routes_LBTX,
        truncated_B=rollout.truncated_B & ~stopped_B,
    )
    return layout.constrain_fields(short)


def judge(completions: Completions, tokenizer: Tokenizer, scorer: Scorer, stop: Sequence[str] = ()) -> Judged:
    """The rewards of completions, each read up to the first of the stop strings. Raises `scoring.RewardsFailed`, in all
    processes alike."""
    prompts, rollout, B = completions.prompts, completions.rollout, completions.rollout.tokens_BT.shape[0]
    width = prompts.tokens_QP.shape[1]
    texts = batches.completion_texts(tokenizer, completions.tokens_BT, width, completions.lengths_B, stop)
    group = len(texts) // len(prompts.examples)
    examples = [example for example in prompts.examples for _ in range(group)]
    scores = distributed.gather_rows(completions.local_B, B, *scorer(texts, examples, group))
    lengths = distributed.fetch((rollout.completion_lengths_B, rollout.truncated_B))
    judged = Judged(rollout, completions.local_B, examples, texts, *scores, *lengths)
    scorer.check(judged.failed_BR)
    return judged


def sample_line(example: Example, text: str, reward: float) -> dict[str, Any]:
    """A completion as samples.jsonl and the live display have it."""
    return {"prompt": example.prompt, "completion": text, "answer": example.answer, "reward": float(reward)}


def rows_of(groups: np.ndarray, num_generations: int) -> np.ndarray:
    """Indices of prompts -> those of their rows."""
    return (groups[:, None] * num_generations + np.arange(num_generations)).reshape(-1)


def spread(rewards_B: np.ndarray, num_generations: int) -> np.ndarray:
    """[Q] largest minus smallest reward of each group: 0 where the group teaches nothing."""
    rewards_QG = rewards_B.reshape(-1, num_generations)
    return rewards_QG.max(axis=1) - rewards_QG.min(axis=1)
