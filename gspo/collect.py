"""Experience: prompts -> completions -> rewards -> advantages -> the batch that the updates of one rollout share.

    draw      sample G completions for each prompt, score them with verifiable rewards and with reward models
    select    dynamic sampling (DAPO §3.2): keep groups whose rewards differ, draw again for the rest
    shape     what is added to the raw reward: a penalty on length, on the distance to the reference
    compare   advantages of each completion against its group

Everything here is a function of the state, the data position and one random key.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gspo import plans
from gspo.data import batches
from gspo.data.rewards import overlong_penalty
from gspo.data.scoring import make_scorer
from gspo.data.tokenizer import Tokenizer
from gspo.generate import Generator, Judged, judge, rows_of, sample_line, spread
from gspo.learning.agreement import Gap, gap_between
from gspo.learning.mismatch import make_rounding
from gspo.masked import masked_mean
from gspo.model.routing import by_layer, changed, recorded
from gspo.objectives import advantages
from gspo.parallel import distributed
from gspo.reward_source import load_reward_models, with_models
from gspo.run.progress import Timer
from gspo.steps import Steps
from gspo.types import Batch, LossInputs, Params, Rollout, TrainState, completion_mask, map_arrays, row_axis


class Experience(NamedTuple):
    batch: Batch
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    next_cursor: int  # prompts consumed so far
    sampler_gap: Gap | None  # sampler against learner over all rows, where both are known and should agree
    rewards_B: np.ndarray  # raw, of all rows; so the next
    truncated_B: np.ndarray


class Collector:
    """collect(state, cursor, key, timer) -> Experience."""

    def __init__(self, plan: plans.RLPlan, steps: Steps, tokenizer: Tokenizer, source: batches.PromptSource):
        self.plan, self.rollout, self.width = plan.experience, plan.rollout, plan.data.max_completion_length
        self.critic, self.steps, self.tokenizer, self.num_samples = plan.critic, steps, tokenizer, plan.log.num_samples
        self.stop, self.fetched = plan.data.stop, plan.reference.storage.fetched
        functions = self.plan.reward_functions
        self.scorer = make_scorer([*functions], source.task, [*functions.values()], plan.judging)
        self.models = load_reward_models(plan, steps, tokenizer)
        self.generate = Generator(steps.layout, source, steps.sampler, self.rollout.num_generations, self.stop)
        self.rounding = make_rounding(self.rollout.params, plan.lora and plan.lora.scale)
        self.advantage_fn = advantages.ADVANTAGES[self.plan.scale_rewards]
        # Under jit, so that on many processes every array is one of the whole mesh.
        self._as_batch, self._take, self._compare = map(jax.jit, (self._batch_of, self._taken, self._compared))

    def __call__(self, state: TrainState, cursor: int, key: jax.Array, timer: Timer) -> Experience:
        draws, cursor = self.draws(state, cursor, key, timer)
        with timer("reward"):
            draw = self.select(draws)
        with timer("old_logps"):
            batch, measured, gap = self.score(state, draw.rollout)
            jax.block_until_ready(batch)
        with timer("reward"):
            batch = self.compare(state, batch, self.shape(draw), draw.truncated_B)
        metrics = self.metrics(draws) | measured
        if self.plan.filter_groups:
            metrics["filter_groups/draws"] = len(draws)
            metrics |= {f"kept_groups/{name}": value for name, value in self.metrics([draw]).items()}
        return Experience(batch, metrics, self.samples(draw), cursor, gap, draw.rewards_B, draw.truncated_B)

    def draws(self, state: TrainState, cursor: int, key: jax.Array, timer: Timer) -> tuple[list[Judged], int]:
        """Rollouts of the next prompts, one, or under dynamic sampling as many as it takes; and the cursor after
        them."""
        with timer("rollout"):
            policy = state.stale_params[0] if state.stale_params else state.params
            params = self.steps.rollout_params(self.rounding(state.full(policy)))
        found: list[Judged] = []
        while not found or (self.plan.filter_groups and not self._enough(found)):
            found.append(self.draw(params, cursor, jax.random.fold_in(key, len(found)), timer))
            cursor += self.rollout.num_prompts
        return found, cursor

    def draw(self, params: Params, cursor: int, key: jax.Array, timer: Timer) -> Judged:
        """Completions of the prompts at positions cursor .. cursor + Q of the run, and their rewards."""
        with timer("rollout"):
            completions = self.generate(params, cursor, self.rollout.num_prompts, key)
        with timer("reward"):
            judged = judge(completions, self.tokenizer, self.scorer, self.stop)
            return with_models(judged, self.plan, self.models)

    def _enough(self, draws: list[Judged]) -> bool:
        """Whether the draws hold enough groups with rewards that differ, or are as many as there may be."""
        mixed = sum(int((spread(draw.rewards_B, self.rollout.num_generations) > 0).sum()) for draw in draws)
        return mixed >= self.rollout.num_prompts or len(draws) >= self.plan.max_num_gen_batches

    def select(self, draws: list[Judged]) -> Judged:
        """The first Q groups with rewards that differ, filled up with groups that do not; shapes never change. The raw
        reward decides: a penalty on length would make every group look mixed.
        """
        if len(draws) == 1:
            return draws[0]
        G, Q = self.rollout.num_generations, self.rollout.num_prompts
        mixed = np.concatenate([spread(draw.rewards_B, G) > 0 for draw in draws])
        rows = rows_of(np.sort(np.argsort(~mixed, kind="stable")[:Q]), G)
        known = {
            i * Q * G + row: pair
            for i, draw in enumerate(draws)
            for row, *pair in zip(draw.local_B, draw.examples, draw.texts, strict=True)
        }
        local_B = np.flatnonzero([row in known for row in rows])
        examples, texts = ([known[rows[b]][i] for b in local_B] for i in (0, 1))
        rollout = self._take([draw.rollout for draw in draws], rows)
        names = ("rewards_B", "parts_BR", "failed_BR", "lengths_B", "truncated_B")
        numbers = {name: np.concatenate([getattr(draw, name) for draw in draws])[rows] for name in names}
        return Judged(rollout, local_B, examples, texts, **numbers)

    def _taken(self, rollouts: list[Rollout], rows: jax.Array) -> Rollout:
        """Rows of several rollouts, numbered through, as one."""

        def take(dims: str, *arrays: jax.Array):
            if not dims:  # decode_steps
                return jnp.max(jnp.stack(arrays))
            axis = row_axis(dims)
            return jnp.take(jnp.concatenate(arrays, axis), rows, axis)

        return self.steps.layout.constrain_fields(map_arrays(take, *rollouts))

    def _batch_of(self, rollout: Rollout) -> Batch:
        mask_BC = completion_mask(rollout.completion_lengths_B, self.width)
        zeros_BC = jnp.zeros(mask_BC.shape, jnp.float32)
        batch = Batch(
            tokens_BT=rollout.tokens_BT,
            prompt_lengths_B=rollout.prompt_lengths_B,
            completion_lengths_B=rollout.completion_lengths_B,
            inputs=LossInputs(logp_BC=None, old_logp_BC=rollout.logp_BC, advantages_BC=zeros_BC, mask_BC=mask_BC),
            old_routes_LBTX=rollout.routes_LBTX,
            replayed_routes_LBTX=rollout.routes_LBTX if self.plan.replay == "R3" else None,
        )
        return self.steps.layout.constrain_fields(batch)

    def score(self, state: TrainState, rollout: Rollout) -> tuple[Batch, dict[str, float], Gap | None]:
        """The rollout as the learner sees it, advantages still missing: old log-probs, reference log-probs, routes. And
        how far the sampler's routes and log-probs are from the learner's, where both are known.
        """
        plan, scorer, batch = self.plan, self.steps.scorer, self._as_batch(rollout)
        inputs, mode, measured, gap = batch.inputs, plan.replay, {}, None
        rows = (rollout.tokens_BT, rollout.prompt_lengths_B)
        router_logp = "old_router_logp_LBCX" in self.steps.objective.needs
        if plan.old_logps == "learner" or mode == "R2" or plan.router_kl or router_logp:
            # Under R3 the policy in training runs the sampler's experts, so the old policy does too. Else it routes
            # freely, and what it chose is what drift is measured against and, under R2, what is replayed.
            old = scorer(state.policy, *rows, rollout.routes_LBTX if mode == "R3" else None)
            if mode != "R3":
                batch = batch.replace(old_routes_LBTX=old.free_routes_LBTX)
            if mode == "R2":
                batch = batch.replace(replayed_routes_LBTX=old.free_routes_LBTX)
            batch = batch.replace(old_router_logits_LBTE=old.router_logits_LBTE)
            inputs = inputs.replace(old_router_logp_LBCX=old.router_logp_LBCX)
            if plan.old_logps == "learner":
                inputs = inputs.replace(old_logp_BC=old.logp_BC, sampler_logp_BC=rollout.logp_BC)
            if not self.rollout.differs:
                gap = Gap(*map(float, distributed.fetch(gap_between(rollout.logp_BC, old.logp_BC, inputs.mask_BC))))
            if rollout.routes_LBTX is not None:
                changed_L = distributed.fetch(_changed_by_layer(rollout.routes_LBTX, old.free_routes_LBTX))
                measured["routing/sampler_experts_changed"] = float(np.mean(changed_L))
                measured["routing/sampler_experts_changed_by_layer"] = changed_L.tolist()
        if state.ref_params is not None:
            inputs = inputs.replace(ref_logp_BC=scorer(state.full(self.fetched(state.ref_params)), *rows).logp_BC)
        return batch.replace(inputs=inputs), measured, gap

    def shape(self, draw: Judged) -> np.ndarray:
        """Raw rewards plus DAPO's soft penalty on the last tokens of the frame, [B] float32."""
        rewards_B = draw.rewards_B.astype(np.float32)
        if not self.plan.overlong_len:
            return rewards_B
        penalty = [overlong_penalty(int(length), self.width, self.plan.overlong_len) for length in draw.lengths_B]
        return rewards_B + self.plan.overlong_penalty_factor * np.array(penalty, np.float32)

    def compare(self, state: TrainState, batch: Batch, shaped_B: np.ndarray, truncated_B: np.ndarray) -> Batch:
        """Fills in the advantages, against the group or the critic, and takes rows that were cut off out of the loss
        where that is asked for. A penalty on the distance to the reference, β log π_old/π_ref per token, is part of
        what is compared."""
        value_fn = self.steps.value_fn
        values_BC = None if value_fn is None else value_fn(state.critic.params, batch.tokens_BT, batch.prompt_lengths_B)
        return self._compare(batch, shaped_B, truncated_B, values_BC)

    def _compared(self, batch: Batch, shaped_B, truncated_B, values_BC) -> Batch:
        plan, inputs, mask_BC = self.plan, batch.inputs, batch.inputs.mask_BC
        penalty_BC = jnp.zeros(mask_BC.shape, jnp.float32)
        if plan.reward_kl_coef:
            penalty_BC = plan.reward_kl_coef * jnp.where(mask_BC, inputs.old_logp_BC - inputs.ref_logp_BC, 0.0)
        if values_BC is None:
            scores_B = shaped_B - jnp.sum(penalty_BC, axis=1)
            advantages_BC = self.advantage_fn(scores_B, self.rollout.num_generations)[:, None]
        else:
            rewards_BC = advantages.token_rewards(shaped_B, penalty_BC, mask_BC)
            raw_BC, returns_BC = advantages.gae(rewards_BC, values_BC, mask_BC, self.critic.gamma, self.critic.lam)
            batch = batch.replace(old_values_BC=values_BC, returns_BC=returns_BC)
            mean = masked_mean(raw_BC, mask_BC).value
            deviation = jnp.sqrt(masked_mean(jnp.square(raw_BC - mean), mask_BC).value)
            advantages_BC = (raw_BC - mean) / (deviation + advantages.EPSILON)
        advantages_BC = advantages.weighted_by_sign(advantages_BC, plan.advantage_weight_pos, plan.advantage_weight_neg)
        if plan.mask_truncated_completions:
            mask_BC = mask_BC & ~truncated_B[:, None]
        inputs = inputs.replace(mask_BC=mask_BC, advantages_BC=jnp.where(mask_BC, advantages_BC, 0.0))
        return self.steps.layout.constrain_fields(batch.replace(inputs=inputs))

    def metrics(self, draws: list[Judged]) -> dict[str, float]:
        """Of all that was drawn, kept or not. Lengths in tokens; rewards raw, but for reward/shaped_mean."""
        rewards_B, lengths_B, truncated_B, parts_BR, failed_BR = (
            np.concatenate([getattr(draw, name) for draw in draws])
            for name in ("rewards_B", "lengths_B", "truncated_B", "parts_BR", "failed_BR")
        )
        return {
            "reward/mean": float(rewards_B.mean()),
            "reward/std": float(rewards_B.std()),
            "reward/failed": float(failed_BR.any(axis=1).mean()),
            "reward/shaped_mean": float(np.concatenate([self.shape(draw) for draw in draws]).mean()),
            "frac_reward_zero_std": float((spread(rewards_B, self.rollout.num_generations) == 0).mean()),
            "completions/mean_length": float(lengths_B.mean()),
            "completions/max_length": int(lengths_B.max()),
            "completions/clipped_ratio": float(truncated_B.mean()),
            "num_tokens": int(lengths_B.sum()),
        } | {f"rewards/{name}": float(parts_BR[:, r].mean()) for r, name in enumerate(self.plan.rewards)}

    def samples(self, draw: Judged) -> list[dict[str, Any]]:
        """The first rows among those of this process. With several processes they need not be the first of all."""
        rows = list(zip(draw.examples, draw.texts, draw.rewards_B[draw.local_B], strict=True))
        return [sample_line(*row) for row in rows[: self.num_samples]]


@jax.jit
def _changed_by_layer(sampled_LBTX, scored_LBTX):
    return by_layer(changed(sampled_LBTX, scored_LBTX), recorded(sampled_LBTX))
