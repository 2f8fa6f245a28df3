"""Trained reward models as rewards of reinforcement learning: `rewards=("reward_model:runs/rm", "task")`.

They read the rollout where it lies, on the devices, and by its tokens: so they have to know the policy's tokenizer.
They may be of another size than the policy. Their weights are frozen, lie on the mesh as the policy's do, and belong to
their own folder: a run does not save them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gspo import plans
from gspo.data.tokenizer import Tokenizer
from gspo.generate import Judged
from gspo.held import Storage
from gspo.learning.critic import Critic
from gspo.learning.rewards import STATISTICS, CompletionRows, make_reward_fn
from gspo.model.transformer import abstract_params
from gspo.parallel import distributed
from gspo.run.identity import REWARD_MODEL, identity, restore_known, spec_of
from gspo.run.stored import read_content
from gspo.steps import Steps, check_heads, rows_per_prompt_of
from gspo.types import Params, Rollout, UserError


class RewardModel(NamedTuple):
    """rollout -> [B] float32 on every host: (r(x, y) − mean) / std, within ±clip (0: no limit)."""

    reward: Callable[[Params, CompletionRows], object]  # jitted
    params: Params
    mean: float = 0.0
    std: float = 1.0
    clip: float = 0.0
    storage: Storage = Storage("reward_model.")

    def __call__(self, rollout: Rollout) -> np.ndarray:
        rows = CompletionRows(rollout.tokens_BT, rollout.prompt_lengths_B, rollout.completion_lengths_B)
        scores_B = np.asarray(distributed.fetch(self.reward(self.storage.fetched(self.params), rows)), np.float64)
        scores_B = (scores_B - self.mean) / self.std
        return (np.clip(scores_B, -self.clip, self.clip) if self.clip else scores_B).astype(np.float32)


def load_reward_models(plan: plans.RLPlan, steps: Steps, tokenizer: Tokenizer) -> dict[str, RewardModel]:
    """Those among plan.experience.rewards, by their whole names. Raises UserError where one cannot be read, is none, or
    reads other tokens than the policy writes."""
    return _by_name(plan, lambda folder: _load(folder, plan, steps, tokenizer))


def abstract_reward_models(plan: plans.RLPlan, steps: Steps) -> dict[str, RewardModel]:
    """As `load_reward_models`, with abstract parameters: nothing is restored, and no tokenizer compared."""
    kept = plan.experience.reward_model_storage.abstract

    def made(folder: str) -> RewardModel:
        model, reward = _scorer_of(_content_of(folder)["identity"], plan, steps)
        return RewardModel(reward, kept(abstract_params(model, steps.layout)))

    return _by_name(plan, made)


def _by_name(plan: plans.RLPlan, make: Callable[[str], RewardModel]) -> dict[str, RewardModel]:
    """Those of the rewards that are models, each made from its folder; its mistakes name it."""
    found = {}
    for name in plan.experience.reward_models:
        try:
            found[name] = make(name.removeprefix(plans.REWARD_MODEL_PREFIX))
        except UserError as error:
            raise UserError(f"rewards: {name!r}: {error}") from None
    return found


def _content_of(folder: str) -> dict[str, Any]:
    content = read_content(folder) or {}
    if content.get("identity") is None:
        raise UserError(
            "there is no checkpoint that says what it is of; give the workdir of experiments/reward_model.py"
        )
    return content


def _load(folder: str, plan: plans.RLPlan, steps: Steps, tokenizer: Tokenizer) -> RewardModel:
    content = _content_of(folder)
    saved = content["identity"]
    if saved["tokenizer"] is None:
        raise UserError("it was saved without a tokenizer; import it from a folder with a tokenizer.json")
    model, reward = _scorer_of(saved, plan, steps)
    own = identity(model.spec, tokenizer, kind=REWARD_MODEL)
    _, params = restore_known(folder, model, steps.layout, own)
    mean, std = 0.0, 1.0
    if plan.experience.normalize_reward_models:
        statistics = content["meta"].get(STATISTICS)
        if statistics is None:
            raise UserError("nothing is known of its scores on its training data; set reward_model.normalize=False")
        mean, std = statistics["mean"], max(statistics["std"], 1e-6)
    storage = plan.experience.reward_model_storage
    return RewardModel(reward, storage.kept(params), mean, std, plan.experience.clip_reward_models, storage)


def _scorer_of(saved: Mapping, plan: plans.RLPlan, steps: Steps) -> tuple[Critic, Callable]:
    """A reward model of that identity under the run's layout, and RewardModel.reward."""
    layout, runs = steps.layout, {name: getattr(steps.model.spec, name) for name in ("dtype", "moe_backend")}
    spec = dataclasses.replace(spec_of(saved), **runs)
    check_heads(layout, spec, whose="its ")
    model = Critic(spec, layout)
    reward = make_reward_fn(
        model,
        completion_width=plan.data.max_completion_length,
        micro_batch_size=plan.rows_at_a_time,
        rows_per_prompt=rows_per_prompt_of(plan, layout),
    )
    return model, reward


def with_models(judged: Judged, plan: plans.ExperiencePlan, models: Mapping[str, RewardModel]) -> Judged:
    """Completions that were judged by the functions among the rewards of the plan, and now by the models among them
    too, which never fail."""
    if not models:
        return judged
    functions = zip(judged.parts_BR.T, judged.failed_BR.T, strict=True)
    never_B = np.zeros(len(judged.rewards_B), bool)
    parts, failed = zip(
        *((models[name](judged.rollout), never_B) if name in models else next(functions) for name in plan.rewards),
        strict=True,
    )
    parts_BR = np.stack(parts, axis=1)
    rewards_B = parts_BR @ np.asarray(plan.weights, np.float32)
    return judged._replace(parts_BR=parts_BR, failed_BR=np.stack(failed, axis=1), rewards_B=rewards_B)
