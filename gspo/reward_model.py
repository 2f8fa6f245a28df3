"""Training of a reward model on preferences: r(x, y) such that σ(r(x, y_c) − r(x, y_r)) predicts which of two
completions was preferred. Reinforcement learning then takes it as `rewards=("reward_model:<workdir>",)`
(`gspo.reward_source`).
"""

from functools import partial
from typing import Any

from gspo import supervised_plans
from gspo.learning.critic import Critic
from gspo.learning.rewards import PAIR, STATISTICS, make_reward_fn, make_reward_step
from gspo.learning.state import reward_model_start, shardings_of
from gspo.model.transformer import abstract_params
from gspo.objectives import bradley_terry
from gspo.pairs import SHOWN, evaluated, make_pairs, prepare, score_all
from gspo.run.identity import POLICY, kind_of, saved_identity
from gspo.steps import make_model, optimizer_of
from gspo.supervised import Course, run
from gspo.types import TrainState

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
    parts = prepare(plan)
    layout, tokenizer, source = parts.layout, parts.tokenizer, parts.source
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
    def evaluate(state: TrainState):
        return evaluated(plan, parts, partial(reward, state.params)), []

    def remembered(state: TrainState):
        count = min(STATISTICS_PAIRS, len(source))
        scores_Q2 = score_all(layout, source, count, plan.batch_size, partial(reward, state.params))
        return {STATISTICS: {"mean": float(scores_Q2.mean()), "std": float(scores_Q2.std())}}

    # ------------------------------------------------------------------ loop
    def update(state: TrainState, cursor: int):
        return *step(state, make_pairs(layout, source, cursor, plan.batch_size)), cursor + plan.batch_size

    course = Course(
        start, policy, tokenizer, update, evaluate, learning_rate, parts.notes, remembered=remembered, shown=SHOWN
    )
    return run(plan, workdir, course, allow_changed_config=allow_changed_config, title=title)
