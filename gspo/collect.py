"""Experience: prompts -> completions -> rewards -> advantages -> the batch that the updates of one rollout share.

    draw      sample G completions for each prompt, score them with verifiable rewards
    select    dynamic sampling (DAPO §3.2): keep groups whose rewards differ, draw again for the rest
    shape     what is added to the raw reward: a penalty on length, on the distance to the reference
    compare   advantages of each completion against its group
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gspo import advantages, build
from gspo.data import batches
from gspo.data.rewards import Example, overlong_penalty
from gspo.data.tokenizer import Tokenizer
from gspo.masked import masked_mean
from gspo.metrics import Timer
from gspo.mismatch import make_rounding
from gspo.model.routing import by_layer, changed, recorded
from gspo.types import Batch, Rollout, TrainState, UserError, completion_mask


class Draw(NamedTuple):
    """One call of the sampler with its rewards; arrays of B = Q · G rows. `rollout` is on the devices, the rest on the host."""

    rollout: Rollout
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

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        tokenizer: Tokenizer,
        source: batches.PromptSource,
        sampler: Callable,
        scorer: Callable,
        needs: tuple[str, ...],
        value_fn: Callable | None = None,
    ):
        """needs: the arrays that the objective reads beside the usual ones (`Objective.needs`). value_fn: the critic, where the
        advantages come from one (`gspo.critic.make_value_fn`).
        """
        self.config, self.mesh, self.tokenizer, self.source = config, mesh, tokenizer, source
        self.sampler, self.scorer, self.needs, self.value_fn = sampler, scorer, needs, value_fn
        self.rewards = build.reward_functions(config, source)
        self.rounding = make_rounding(config.mismatch.params)
        self.advantage_fn = advantages.ADVANTAGES[config.scale_rewards]

    def __call__(self, state: TrainState, cursor: int, key: jax.Array, timer: Timer) -> Experience:
        params = self.rounding(state.stale_params[0] if state.stale_params else state.params)
        draws = [self.draw(params, cursor, key, timer)]
        if self.config.filter_groups.enable:
            while self._mixed(draws) < self.config.num_prompts and len(draws) < self.config.filter_groups.max_num_gen_batches:
                cursor += self.config.num_prompts
                draws.append(self.draw(params, cursor, jax.random.fold_in(key, len(draws)), timer))
        with timer("reward"):
            draw = self.select(draws)
        with timer("old_logps"):
            batch, measured = self.score(state, draw.rollout)
            jax.block_until_ready(batch)
        with timer("reward"):
            lengths_B, truncated_B = jax.device_get((draw.rollout.completion_lengths_B, draw.rollout.truncated_B))
            shaped_B = self.shape(draw, lengths_B)
            batch = self.compare(state, batch, shaped_B, draw.rollout.truncated_B)
        metrics = self.metrics(draw, lengths_B, truncated_B, shaped_B) | measured
        if self.config.filter_groups.enable:
            metrics["filter_groups/draws"] = len(draws)
        return Experience(batch, metrics, self.samples(draw), cursor + self.config.num_prompts)

    def draw(self, params, cursor: int, key: jax.Array, timer: Timer) -> Draw:
        """Samples the prompts at positions cursor .. cursor + Q of the run, and scores the completions."""
        with timer("rollout"):
            prompts = self.source.batch(cursor, self.config.num_prompts)
            rollout = self.sampler(params, *build.put_rows(self.mesh, prompts.tokens_QP, prompts.lengths_Q), key)
            tokens_BT, lengths_B = jax.device_get((rollout.tokens_BT, rollout.completion_lengths_B))
        with timer("reward"):
            texts = batches.completion_texts(self.tokenizer, tokens_BT, prompts.tokens_QP.shape[1], lengths_B)
            examples = [example for example in prompts.examples for _ in range(self.config.num_generations)]
            rewards_B, parts_BR = batches.score_completions(
                texts, examples, list(self.rewards.values()), self.config.reward_weights
            )
        return Draw(rollout, examples, texts, rewards_B, parts_BR)

    def _mixed(self, draws: list[Draw]) -> int:
        return sum(int((spread(draw.rewards_B, self.config.num_generations) > 0).sum()) for draw in draws)

    def select(self, draws: list[Draw]) -> Draw:
        """The first Q groups with rewards that differ, filled up with groups that do not; shapes never change. The raw reward
        decides: a penalty on length would make every group look mixed.
        """
        if len(draws) == 1:
            return draws[0]
        G, Q = self.config.num_generations, self.config.num_prompts
        mixed = np.concatenate([spread(draw.rewards_B, G) > 0 for draw in draws])
        groups = np.sort(np.argsort(~mixed, kind="stable")[:Q])
        rows = (groups[:, None] * G + np.arange(G)).reshape(-1)

        def take(name: str, *arrays):
            axis = int(name == "routes_LBTX")
            return None if arrays[0] is None else jnp.take(jnp.concatenate(arrays, axis), rows, axis)

        fields = {name: [getattr(draw.rollout, name) for draw in draws] for name in vars(draws[0].rollout) if name != "decode_steps"}
        rollout = Rollout(
            **{name: take(name, *arrays) for name, arrays in fields.items()},
            decode_steps=jnp.max(jnp.stack([draw.rollout.decode_steps for draw in draws])),
        )
        examples, texts = ([item for draw in draws for item in draw[i]] for i in (1, 2))
        rewards_B, parts_BR = (np.concatenate([draw[i] for draw in draws])[rows] for i in (3, 4))
        return Draw(rollout, [examples[r] for r in rows], [texts[r] for r in rows], rewards_B, parts_BR)

    def score(self, state: TrainState, rollout: Rollout) -> tuple[Batch, dict[str, float]]:
        """The rollout as the learner sees it, advantages still missing: old log-probs, reference log-probs, routes. And how far the
        sampler's routes are from the learner's, where both are known.
        """
        config = self.config
        mask_BC = completion_mask(rollout.completion_lengths_B, config.max_completion_length)
        batch = Batch(
            tokens_BT=rollout.tokens_BT,
            prompt_lengths_B=rollout.prompt_lengths_B,
            completion_lengths_B=rollout.completion_lengths_B,
            loss_mask_BC=mask_BC,
            advantages_BC=jnp.zeros(mask_BC.shape, jnp.float32),
            old_logp_BC=rollout.logp_BC,
            routes_LBTX=rollout.routes_LBTX,
        )
        mode, measured = config.router_replay.mode, {}
        rows = (rollout.tokens_BT, rollout.prompt_lengths_B)
        if config.old_logps == "learner" or mode == "R2" or config.log.router_kl or "old_router_logp_LBCX" in self.needs:
            # Under R3 the policy in training runs the sampler's experts, so the old policy does too. Else it routes freely, and what it
            # chose is what drift is measured against and, under R2, what is replayed.
            old = self.scorer(state.params, *rows, *((rollout.routes_LBTX, True) if mode == "R3" else ()))
            batch = batch.replace(
                routes_LBTX=rollout.routes_LBTX if mode == "R3" else old.routes_LBTX,
                old_router_logp_LBCX=old.router_logp_LBCX,
                old_router_logits_LBTE=old.router_logits_LBTE,
            )
            if config.old_logps == "learner":
                batch = batch.replace(old_logp_BC=old.logp_BC, sampler_logp_BC=rollout.logp_BC)
            if rollout.routes_LBTX is not None:
                changed_L = by_layer(changed(rollout.routes_LBTX, old.routes_LBTX), recorded(rollout.routes_LBTX))
                measured["routing/sampler_experts_changed"] = float(jnp.mean(changed_L))
                measured["routing/sampler_experts_changed_by_layer"] = changed_L.tolist()
        if state.ref_params is not None:
            batch = batch.replace(ref_logp_BC=self.scorer(state.ref_params, *rows).logp_BC)
        return batch, measured

    def shape(self, draw: Draw, lengths_B: np.ndarray) -> np.ndarray:
        """Raw rewards plus DAPO's soft penalty on the last tokens of the frame, [B] float32."""
        config, shaped_B = self.config, draw.rewards_B.astype(np.float32)
        if config.overlong_buffer.len:
            limits = (config.max_completion_length, config.overlong_buffer.len)
            penalty = [overlong_penalty(int(length), *limits) for length in lengths_B]
            shaped_B = shaped_B + config.overlong_buffer.penalty_factor * np.array(penalty, np.float32)
        return shaped_B

    def compare(self, state: TrainState, batch: Batch, shaped_B: np.ndarray, truncated_B: jax.Array) -> Batch:
        """Fills in the advantages, against the group or the critic, and takes rows that were cut off out of the loss where the config
        says so. A penalty on the distance to the reference, β log π_old/π_ref per token, is part of what is compared.
        """
        config, mask_BC = self.config, batch.loss_mask_BC
        penalty_BC = jnp.zeros(mask_BC.shape, jnp.float32)
        if config.reward_kl_coef:
            penalty_BC = config.reward_kl_coef * jnp.where(mask_BC, batch.old_logp_BC - batch.ref_logp_BC, 0.0)
        if self.value_fn is None:
            scores_B = jnp.asarray(shaped_B) - jnp.sum(penalty_BC, axis=1)
            advantages_BC = self.advantage_fn(scores_B, config.num_generations)[:, None]
        else:
            rewards_BC = advantages.token_rewards(jnp.asarray(shaped_B), penalty_BC, mask_BC)
            values_BC = self.value_fn(state.critic.params, batch.tokens_BT, batch.prompt_lengths_B)
            raw_BC, returns_BC = advantages.gae(rewards_BC, values_BC, mask_BC, config.critic.gamma, config.critic.lam)
            batch = batch.replace(old_values_BC=values_BC, returns_BC=returns_BC)
            mean = masked_mean(raw_BC, mask_BC).value
            deviation = jnp.sqrt(masked_mean(jnp.square(raw_BC - mean), mask_BC).value)
            advantages_BC = (raw_BC - mean) / (deviation + advantages.EPSILON)
        advantages_BC = advantages.weighted_by_sign(advantages_BC, config.advantage_weight_pos, config.advantage_weight_neg)
        if config.mask_truncated_completions:
            mask_BC = mask_BC & ~truncated_B[:, None]
        return batch.replace(loss_mask_BC=mask_BC, advantages_BC=jnp.where(mask_BC, advantages_BC, 0.0))

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
        rows = list(zip(draw.examples, draw.texts, draw.rewards_B, strict=True))[: self.config.log.num_samples]
        return [{"prompt": ex.prompt, "completion": text, "answer": ex.answer, "reward": float(r)} for ex, text, r in rows]


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
            f"overlong_buffer.len={config.overlong_buffer.len}: must be in 0..{config.max_completion_length - 1} (0: no penalty)"
        )
    if min(config.advantage_weight_pos, config.advantage_weight_neg) < 0:
        raise UserError("advantage_weight_pos and advantage_weight_neg: must not be negative")
    if config.filter_groups.enable:
        build.positive(config, "filter_groups.max_num_gen_batches")
        if config.prompt_buckets:
            raise UserError("filter_groups.enable: rows of several draws share one frame; leave prompt_buckets empty")
