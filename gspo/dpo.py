"""Direct preference optimization: a policy trained on preferences without a reward model and without sampling. The
reference is what it begins with (init_from), frozen; the data path is that of the reward model.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gspo import supervised_plans
from gspo.learning.learner import make_train_step
from gspo.learning.rewards import PAIR, CompletionRows
from gspo.learning.scores import make_scorer
from gspo.learning.state import shardings_of, state_on_mesh
from gspo.model.distribution import Sampling
from gspo.objectives import DPO, implicit_rewards
from gspo.pairs import SHOWN, evaluated, make_pairs, prepare
from gspo.steps import make_model, optimizer_of
from gspo.supervised import Course, run
from gspo.types import Batch, LossInputs, TrainState, completion_mask


def train(
    plan: supervised_plans.DPOPlan, workdir: str, *, allow_changed_config: bool = False, title: str = "DPO"
) -> dict[str, Any]:
    """Runs, or resumes, DPO in workdir. Returns the last line of its metrics. Raises UserError."""
    # ------------------------------------------------------------------ layout, data, model
    micro, width = plan.update.micro_batch_size, plan.data.max_completion_length
    parts = prepare(plan)
    layout, tokenizer = parts.layout, parts.tokenizer
    model = make_model(plan.model, tokenizer, layout, plan.lora)
    optimizer, learning_rate = optimizer_of(plan.optimizer)
    start = state_on_mesh(layout, model, optimizer, lora=plan.lora, with_ref=True)
    step = make_train_step(
        model,
        optimizer,
        DPO(plan.beta, plan.label_smoothing),
        plan.update,
        state_shardings=shardings_of(layout, start.abstract),
        rows_per_prompt=PAIR,
    )
    scorer = make_scorer(
        model,
        completion_width=width,
        sampling=Sampling(),
        chunk=plan.update.chunk,
        micro_batch_size=micro,
        rows_per_prompt=PAIR,
        keep=("logp_BC",),
    )

    # ------------------------------------------------------------------ batches, what is measured
    @jax.jit  # so that on many processes every array is one of the whole mesh
    def batch_of(pairs: CompletionRows, ref_logp_BC: jax.Array) -> Batch:
        mask_BC = completion_mask(pairs.completion_lengths_B, width)
        zeros_BC = jnp.zeros(mask_BC.shape, jnp.float32)
        inputs = LossInputs(None, zeros_BC, zeros_BC, mask_BC, ref_logp_BC=ref_logp_BC)
        batch = Batch(pairs.tokens_BT, pairs.prompt_lengths_B, pairs.completion_lengths_B, inputs)
        return layout.constrain_fields(batch)

    @jax.jit
    def rewards_of(logp_BC: jax.Array, ref_logp_BC: jax.Array, lengths_B: jax.Array) -> jax.Array:
        return implicit_rewards(logp_BC, ref_logp_BC, completion_mask(lengths_B, width), plan.beta)

    def score(state: TrainState, pairs: CompletionRows) -> jax.Array:
        trees = (state.policy, state.full(state.ref_params))
        logps = [scorer(params, pairs.tokens_BT, pairs.prompt_lengths_B).logp_BC for params in trees]
        return rewards_of(*logps, pairs.completion_lengths_B)

    def evaluate(state: TrainState):
        return evaluated(plan, parts, partial(score, state)), []

    # ------------------------------------------------------------------ loop
    def update(state: TrainState, cursor: int):
        pairs = make_pairs(layout, parts.source, cursor, plan.batch_size)
        ref_logp_BC = scorer(state.full(state.ref_params), pairs.tokens_BT, pairs.prompt_lengths_B).logp_BC
        return *step(state, batch_of(pairs, ref_logp_BC)), cursor + plan.batch_size

    notes = parts.notes
    if not plan.init_from:
        notes.append("warning: without init_from the reference is a policy of random parameters")
    course = Course(start, model, tokenizer, update, evaluate, learning_rate, notes, shown=SHOWN)
    return run(plan, workdir, course, allow_changed_config=allow_changed_config, title=title)
