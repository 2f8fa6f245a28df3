"""Experience: prompts -> completions -> rewards -> advantages -> the batch that the updates of one rollout share.

draw      sample G completions for each prompt, score them with verifiable rewards
select    dynamic sampling (DAPO §3.2): keep groups whose rewards differ, draw again for the rest
shape     what is added to the raw reward: a penalty on length, on the distance to the reference
compare   advantages of each completion against its group
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gspo import build
from gspo.data import batches
from gspo.data.rewards import Example, overlong_penalty
from gspo.data.tokenizer import Tokenizer
from gspo.learning.microbatch import row_axis
from gspo.learning.mismatch import make_rounding
from gspo.masked import masked_mean
from gspo.model.routing import by_layer, changed, recorded
from gspo.objectives import advantages
from gspo.parallel import distributed
from gspo.parallel.sharding import Layout
from gspo.run.progress import Timer
from gspo.steps import Steps
from gspo.types import Batch, Params, Rollout, TrainState, UserError, completion_mask


class Sampled(NamedTuple):
    """Completions of Q prompts, B = Q · G rows. `rollout` is on the devices. On the host, of the rows `own_B` that lie
    on this process's devices: their prompts, tokens and lengths.
    """

    rollout: Rollout
    own_B: np.ndarray
    prompts: batches.PromptBatch
    tokens_BT: np.ndarray
    lengths_B: np.ndarray


class Draw(NamedTuple):
    """One call of the sampler with its rewards, B = Q · G rows. `rollout` is on the devices. On the host: rewards_B and
    parts_BR of all rows; examples and texts of the rows `own_B`, which lie on this process's devices.
    """

    rollout: Rollout
    own_B: np.ndarray
    examples: list[Example]
    texts: list[str]
    rewards_B: np.ndarray  # raw: what the reward functions say, weighted
    parts_BR: np.ndarray


class Experience(NamedTuple):
    batch: Batch
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    next_cursor: int  # prompts consumed so far


class Collector:
    """collect(state, cursor, key, timer) -> Experience. Everything in it is a function of these and of the config."""

    def __init__(self, config: ConfigDict, steps: Steps, tokenizer: Tokenizer, source: batches.PromptSource):
        self.config, self.steps, self.tokenizer, self.source = config, steps, tokenizer, source
        self.rewards = build.reward_functions(config, source)
        self.rounding = make_rounding(config.mismatch.params)
        self.advantage_fn = advantages.ADVANTAGES[config.scale_rewards]
        # Under jit, so that on many processes every array is one of the whole mesh.
        self._as_batch, self._take, self._compare = map(jax.jit, (self._batch_of, self._taken, self._compared))

    def __call__(self, state: TrainState, cursor: int, key: jax.Array, timer: Timer) -> Experience:
        with timer("rollout"):
            params = self.steps.rollout_params(
                self.rounding(state.stale_params[0] if state.stale_params else state.params)
            )
        draws = [self.draw(params, cursor, key, timer)]
        if self.config.filter_groups.enable:
            while (
                self._mixed(draws) < self.config.num_prompts
                and len(draws) < self.config.filter_groups.max_num_gen_batches
            ):
                cursor += self.config.num_prompts
                draws.append(self.draw(params, cursor, jax.random.fold_in(key, len(draws)), timer))
        del params  # a second copy of the policy, which only the sampler reads
        with timer("reward"):
            draw = self.select(draws)
        with timer("old_logps"):
            batch, measured = self.score(state, draw.rollout)
            jax.block_until_ready(batch)
        with timer("reward"):
            lengths_B, truncated_B = distributed.fetch((draw.rollout.completion_lengths_B, draw.rollout.truncated_B))
            shaped_B = self.shape(draw, lengths_B)
            batch = self.compare(state, batch, shaped_B, truncated_B)
        metrics = self.metrics(draw, lengths_B, truncated_B, shaped_B) | measured
        if self.config.filter_groups.enable:
            metrics["filter_groups/draws"] = len(draws)
        return Experience(batch, metrics, self.samples(draw), cursor + self.config.num_prompts)

    def draw(self, params, cursor: int, key: jax.Array, timer: Timer) -> Draw:
        """Samples the prompts at positions cursor .. cursor + Q of the run, and scores the completions: those of its
        own devices, on each host."""
        config, steps = self.config, self.steps
        with timer("rollout"):
            sampled = sample(
                steps.layout,
                self.source,
                steps.sampler,
                params,
                cursor,
                config.num_prompts,
                config.num_generations,
                key,
            )
        with timer("reward"):
            return judge(sampled, self.tokenizer, list(self.rewards.values()), config.reward_weights)

    def _mixed(self, draws: list[Draw]) -> int:
        return sum(int((spread(draw.rewards_B, self.config.num_generations) > 0).sum()) for draw in draws)

    def select(self, draws: list[Draw]) -> Draw:
        """The first Q groups with rewards that differ, filled up with groups that do not; shapes never change. The raw
        reward decides: a penalty on length would make every group look mixed.
        """
        if len(draws) == 1:
            return draws[0]
        G, Q = self.config.num_generations, self.config.num_prompts
        mixed = np.concatenate([spread(draw.rewards_B, G) > 0 for draw in draws])
        rows = rows_of(np.sort(np.argsort(~mixed, kind="stable")[:Q]), G)
        known = {
            i * Q * G + row: pair
            for i, draw in enumerate(draws)
            for row, *pair in zip(draw.own_B, draw.examples, draw.texts, strict=True)
        }
        own_B = np.flatnonzero([row in known for row in rows])
        examples, texts = ([known[rows[b]][i] for b in own_B] for i in (0, 1))
        rewards_B, parts_BR = (np.concatenate([draw[i] for draw in draws])[rows] for i in (4, 5))
        return Draw(self._take([draw.rollout for draw in draws], rows), own_B, examples, texts, rewards_B, parts_BR)

    def _taken(self, rollouts: list[Rollout], rows: jax.Array) -> Rollout:
        """Rows of several rollouts, numbered through, as one."""

        def take(name: str):
            arrays, axis = [getattr(rollout, name) for rollout in rollouts], row_axis(name)
            return None if arrays[0] is None else jnp.take(jnp.concatenate(arrays, axis), rows, axis)

        fields = {name: take(name) for name in vars(rollouts[0]) if name != "decode_steps"}
        steps = jnp.max(jnp.stack([rollout.decode_steps for rollout in rollouts]))
        return self.steps.layout.constrain_fields(Rollout(**fields, decode_steps=steps))

    def _batch_of(self, rollout: Rollout) -> Batch:
        mask_BC = completion_mask(rollout.completion_lengths_B, self.config.max_completion_length)
        return self.steps.layout.constrain_fields(Batch(
            tokens_BT=rollout.tokens_BT,
            prompt_lengths_B=rollout.prompt_lengths_B,
            completion_lengths_B=rollout.completion_lengths_B,
            loss_mask_BC=mask_BC,
            advantages_BC=jnp.zeros(mask_BC.shape, jnp.float32),
            old_logp_BC=rollout.logp_BC,
            routes_LBTX=rollout.routes_LBTX,
        ))  # fmt: skip

    def score(self, state: TrainState, rollout: Rollout) -> tuple[Batch, dict[str, float]]:
        """The rollout as the learner sees it, advantages still missing: old log-probs, reference log-probs, routes. And
        how far the sampler's routes are from the learner's, where both are known.
        """
        config, scorer, batch = self.config, self.steps.scorer, self._as_batch(rollout)
        mode, measured = config.router_replay.mode, {}
        rows = (rollout.tokens_BT, rollout.prompt_lengths_B)
        router_logp = "old_router_logp_LBCX" in self.steps.objective.needs
        if config.old_logps == "learner" or mode == "R2" or config.log.router_kl or router_logp:
            # Under R3 the policy in training runs the sampler's experts, so the old policy does too. Else it routes
            # freely, and what it chose is what drift is measured against and, under R2, what is replayed.
            old = scorer(state.params, *rows, *((rollout.routes_LBTX, True) if mode == "R3" else ()))
            batch = batch.replace(
                routes_LBTX=rollout.routes_LBTX if mode == "R3" else old.routes_LBTX,
                old_router_logp_LBCX=old.router_logp_LBCX,
                old_router_logits_LBTE=old.router_logits_LBTE,
            )
            if config.old_logps == "learner":
                batch = batch.replace(old_logp_BC=old.logp_BC, sampler_logp_BC=rollout.logp_BC)
            if rollout.routes_LBTX is not None:
                changed_L = distributed.fetch(_changed_by_layer(rollout.routes_LBTX, old.routes_LBTX))
                measured["routing/sampler_experts_changed"] = float(np.mean(changed_L))
                measured["routing/sampler_experts_changed_by_layer"] = changed_L.tolist()
        if state.ref_params is not None:
            batch = batch.replace(ref_logp_BC=scorer(state.ref_params, *rows).logp_BC)
        return batch, measured

    def shape(self, draw: Draw, lengths_B: np.ndarray) -> np.ndarray:
        """Raw rewards plus DAPO's soft penalty on the last tokens of the frame, [B] float32."""
        config, shaped_B = self.config, draw.rewards_B.astype(np.float32)
        if config.overlong_buffer.len:
            limits = (config.max_completion_length, config.overlong_buffer.len)
            penalty = [overlong_penalty(int(length), *limits) for length in lengths_B]
            shaped_B = shaped_B + config.overlong_buffer.penalty_factor * np.array(penalty, np.float32)
        return shaped_B

    def compare(self, state: TrainState, batch: Batch, shaped_B: np.ndarray, truncated_B: np.ndarray) -> Batch:
        """Fills in the advantages, against the group or the critic, and takes rows that were cut off out of the loss
        where the config says so. A penalty on the distance to the reference, β log π_old/π_ref per token, is part of
        what is compared."""
        value_fn = self.steps.value_fn
        values_BC = None if value_fn is None else value_fn(state.critic.params, batch.tokens_BT, batch.prompt_lengths_B)
        return self._compare(batch, shaped_B, truncated_B, values_BC)

    def _compared(self, batch: Batch, shaped_B, truncated_B, values_BC) -> Batch:
        config, mask_BC = self.config, batch.loss_mask_BC
        penalty_BC = jnp.zeros(mask_BC.shape, jnp.float32)
        if config.reward_kl_coef:
            penalty_BC = config.reward_kl_coef * jnp.where(mask_BC, batch.old_logp_BC - batch.ref_logp_BC, 0.0)
        if values_BC is None:
            scores_B = shaped_B - jnp.sum(penalty_BC, axis=1)
            advantages_BC = self.advantage_fn(scores_B, config.num_generations)[:, None]
        else:
            rewards_BC = advantages.token_rewards(shaped_B, penalty_BC, mask_BC)
            raw_BC, returns_BC = advantages.gae(rewards_BC, values_BC, mask_BC, config.critic.gamma, config.critic.lam)
            batch = batch.replace(old_values_BC=values_BC, returns_BC=returns_BC)
            mean = masked_mean(raw_BC, mask_BC).value
            deviation = jnp.sqrt(masked_mean(jnp.square(raw_BC - mean), mask_BC).value)
            advantages_BC = (raw_BC - mean) / (deviation + advantages.EPSILON)
        advantages_BC = advantages.weighted_by_sign(
            advantages_BC, config.advantage_weight_pos, config.advantage_weight_neg
        )
        if config.mask_truncated_completions:
            mask_BC = mask_BC & ~truncated_B[:, None]
        batch = batch.replace(loss_mask_BC=mask_BC, advantages_BC=jnp.where(mask_BC, advantages_BC, 0.0))
        return self.steps.layout.constrain_fields(batch)

    def metrics(self, draw: Draw, lengths_B, truncated_B, shaped_B) -> dict[str, float]:
        """Lengths in tokens; rewards raw, but for reward/shaped_mean."""
        rewards_B = draw.rewards_B
        metrics = {
            "reward/mean": float(rewards_B.mean()),
            "reward/std": float(rewards_B.std()),
            "reward/shaped_mean": float(shaped_B.mean()),
            "frac_reward_zero_std": float((spread(rewards_B, self.config.num_generations) == 0).mean()),
            "completions/mean_length": float(lengths_B.mean()),
            "completions/max_length": int(lengths_B.max()),
            "completions/clipped_ratio": float(truncated_B.mean()),
            "num_tokens": int(lengths_B.sum()),
        }
        return metrics | {f"rewards/{name}": float(draw.parts_BR[:, r].mean()) for r, name in enumerate(self.rewards)}

    def samples(self, draw: Draw) -> list[dict[str, Any]]:
        """The first rows among those of this process. With several processes they need not be the first of all."""
        rows = list(zip(draw.examples, draw.texts, draw.rewards_B[draw.own_B], strict=True))[
            : self.config.log.num_samples
        ]
        return [sample_line(*row) for row in rows]


def sample(
    layout: Layout, source: batches.PromptSource, sampler: Callable[..., Rollout], params: Params, cursor: int, num_prompts: int,
    num_generations: int, key: jax.Array,
) -> Sampled:  # fmt: skip
    """Completions of the prompts at positions cursor .. cursor + num_prompts; each process reads the prompts of its own
    devices."""
    rows = layout.sharding("rows")
    own_Q = distributed.own_rows(rows, num_prompts)
    own_B = rows_of(own_Q, num_generations)
    prompts = source.batch(cursor, num_prompts, own_Q)
    rollout = sampler(
        params, *distributed.put_rows(rows, own_Q, num_prompts, prompts.tokens_QP, prompts.lengths_Q), key
    )
    return Sampled(
        rollout, own_B, prompts, *distributed.fetch_rows(own_B, rollout.tokens_BT, rollout.completion_lengths_B)
    )


def judge(sampled: Sampled, tokenizer: Tokenizer, functions: list[Callable], weights: Sequence[float]) -> Draw:
    """The rewards of completions: each process scores its own, and all come to know all of them."""
    prompts, B = sampled.prompts, sampled.rollout.tokens_BT.shape[0]
    texts = batches.completion_texts(tokenizer, sampled.tokens_BT, prompts.tokens_QP.shape[1], sampled.lengths_B)
    examples = [example for example in prompts.examples for _ in range(len(texts) // len(prompts.examples))]
    scored = batches.score_completions(texts, examples, functions, weights)
    return Draw(sampled.rollout, sampled.own_B, examples, texts, *distributed.gather_rows(sampled.own_B, B, *scored))


@jax.jit
def _changed_by_layer(sampled_LBTX, scored_LBTX):
    return by_layer(changed(sampled_LBTX, scored_LBTX), recorded(sampled_LBTX))


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


def check(config: ConfigDict) -> None:
    """Raises UserError for settings of the experience that contradict each other."""
    if config.num_generations < 2 and config.scale_rewards != "reinforce++" and not config.critic.enable:
        raise UserError(
            f"num_generations={config.num_generations}: group advantages compare completions of a prompt; use 2 or more"
        )
    for field, value, known in (
        ("scale_rewards", config.scale_rewards, tuple(advantages.ADVANTAGES)),
        ("old_logps", config.old_logps, ("sampler", "learner")),
        ("router_replay.mode", config.router_replay.mode, ("disabled", "R2", "R3")),
    ):
        if value not in known:
            raise UserError(f"{field}={value!r}: choose one of {', '.join(known)}")
    if not 0 <= config.overlong_buffer.len < config.max_completion_length:
        raise UserError(
            f"overlong_buffer.len={config.overlong_buffer.len}: must be in 0..{config.max_completion_length - 1} (0: "
            "no penalty)"
        )
    if min(config.advantage_weight_pos, config.advantage_weight_neg) < 0:
        raise UserError("advantage_weight_pos and advantage_weight_neg: must not be negative")
    if config.filter_groups.enable:
        build.positive(config, "filter_groups.max_num_gen_batches")
        if config.prompt_buckets:
            raise UserError("filter_groups.enable: rows of several draws share one frame; leave prompt_buckets empty")
