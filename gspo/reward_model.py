"""Training of a reward model on preferences: r(x, y) such that σ(r(x, y_c) − r(x, y_r)) predicts which of two
completions was preferred. Reinforcement learning then takes it as `rewards=("reward_model:<workdir>",)`
(`gspo.reward_source`).
"""

from functools import partial
from typing import Any

import numpy as np

from gspo import supervised_plans
from gspo.generate import check_splits
from gspo.learning.critic import Critic
from gspo.learning.rewards import PAIR, STATISTICS, make_reward_fn, make_reward_step
from gspo.learning.state import reward_model_start, shardings_of
from gspo.model.transformer import abstract_params
from gspo.objectives import bradley_terry
from gspo.pairs import SHOWN, agreement, check_pairs, make_pairs, notes_of, pair_source, score_all
from gspo.resume import tokenizer_of_run
from gspo.run.identity import POLICY, kind_of, saved_identity
from gspo.steps import make_layout, make_model, optimizer_of
from gspo.supervised import Course, run
from gspo.types import Params, TrainState

STATISTICS_PAIRS = 1024  # of the training data, of whose scores these are


def train(
    plan: supervised_plans.RewardModelPlan,
    workdir: str,
    *,
    allow_changed_config: bool = False,
    title: str = "reward model",
) -> dict[str, Any]:
    """Runs, or resumes, the training of a reward model in workdir. Returns the last line of its metrics. Begins with
    the body of a policy, or with a reward model, where init_from names one. Raises UserError."""
    # ------------------------------------------------------------------ layout, data, model
    micro, width = plan.update.micro_batch_size, plan.data.max_completion_length
    layout, tokenizer = make_layout(plan.mesh), tokenizer_of_run(plan)
    check_pairs(layout, plan.batch_size, micro)
    split_notes = check_splits(plan.data)
    source, held_out = (pair_source(plan.data, s, tokenizer) for s in (plan.data.train_split, plan.data.eval_split))
    policy = make_model(plan.model, tokenizer, layout)
    model = Critic(policy.spec, layout)
    optimizer, learning_rate = optimizer_of(plan.optimizer)
    from_policy = plan.init_from and kind_of(saved_identity(plan.init_from)) == POLICY
    start = reward_model_start(layout, model, optimizer, abstract_params(policy, layout) if from_policy else None)
    step = make_reward_step(
        model,
        optimizer,
        partial(bradley_terry, center_rewards_coefficient=plan.center_rewards_coefficient),
        completion_width=width,
        micro_batch_size=micro,
        state_shardings=shardings_of(layout, start.abstract),
    )
    reward = make_reward_fn(model, completion_width=width, micro_batch_size=micro, rows_per_prompt=PAIR)

    # ------------------------------------------------------------------ what is measured
    def scores(params: Params, pairs, count: int) -> np.ndarray:
        return score_all(layout, pairs, min(count, len(pairs)), plan.batch_size, partial(reward, params))

    def evaluate(state: TrainState):
        scores_Q2 = scores(state.params, held_out, plan.evaluation.num_prompts)
        return agreement(scores_Q2[:, 0] - scores_Q2[:, 1]), []

    def remembered(state: TrainState):
        scores_Q2 = scores(state.params, source, STATISTICS_PAIRS)
        return {STATISTICS: {"mean": float(scores_Q2.mean()), "std": float(scores_Q2.std())}}

    # ------------------------------------------------------------------ loop
    def update(state: TrainState, cursor: int):
        return *step(state, make_pairs(layout, source, cursor, plan.batch_size)), cursor + plan.batch_size

    notes = [*split_notes, *notes_of(source, held_out)]
    course = Course(
        start, policy, tokenizer, update, evaluate, learning_rate, notes, remembered=remembered, shown=SHOWN
    )
    return run(plan, workdir, course, allow_changed_config=allow_changed_config, title=title)
