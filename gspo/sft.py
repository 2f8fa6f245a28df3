"""Supervised fine-tuning on demonstrations: the cold start of a policy. It stops early on purpose (pass@1 of 0.1 to
0.6), since reinforcement learning needs groups in which some completions are right and some are wrong.
"""

from typing import Any

import numpy as np

from gspo import plans
from gspo.data.batches import DemonstrationSource
from gspo.evaluate import make_evaluator
from gspo.generate import check_splits, make_task
from gspo.learning.learner import make_train_step
from gspo.learning.state import shardings_of, state_on_mesh
from gspo.objectives import negative_log_likelihood
from gspo.parallel import distributed
from gspo.parallel.sharding import Layout
from gspo.resume import tokenizer_of_run
from gspo.steps import check_rows, describe, make_layout, make_model, optimizer_of
from gspo.supervised import Course, run
from gspo.types import Batch, LossInputs, TrainState, completion_mask


def train(
    plan: plans.SFTPlan, workdir: str, *, allow_changed_config: bool = False, title: str = "SFT"
) -> dict[str, Any]:
    """Runs, or resumes, supervised fine-tuning in workdir. Returns the last line of its metrics. Raises UserError."""
    # ------------------------------------------------------------------ layout, data, model
    micro = plan.update.micro_batch_size
    layout, tokenizer = make_layout(plan.mesh), tokenizer_of_run(plan)
    check_rows(layout, batch_size=micro or plan.batch_size)
    split_notes = check_splits(plan.data)
    source = demonstration_source(plan.data, tokenizer)
    model = make_model(plan.model, tokenizer, layout)
    optimizer, learning_rate = optimizer_of(plan.optimizer)
    start = state_on_mesh(layout, model, optimizer)
    shardings = shardings_of(layout, start.abstract)
    train_step = make_train_step(model, optimizer, negative_log_likelihood, plan.update, state_shardings=shardings)
    evaluate = make_evaluator(plan, model, tokenizer)

    notes = [describe(model, start.abstract), *split_notes]
    if source.num_dropped:
        notes.append(f"{source.num_dropped} examples longer than the frame were dropped")

    # ------------------------------------------------------------------ loop
    def update(state: TrainState, cursor: int):
        batch = make_batch(layout, source, cursor, plan.batch_size)
        return *train_step(state, batch), cursor + plan.batch_size

    course = Course(
        start,
        model.spec,
        tokenizer,
        update,
        evaluate=lambda state: evaluate(state.params),
        learning_rate=learning_rate,
        notes=notes,
    )
    return run(plan, workdir, course, allow_changed_config=allow_changed_config, title=title)


def demonstration_source(plan: plans.DataPlan, tokenizer) -> DemonstrationSource:
    return DemonstrationSource(
        make_task(plan, plan.train_split),
        tokenizer,
        max_prompt_length=plan.max_prompt_length,
        max_completion_length=plan.max_completion_length,
        overlong=plan.overlong_prompts,
        seed=plan.seed,
    )


def make_batch(layout: Layout, source: DemonstrationSource, cursor: int, count: int) -> Batch:
    """`count` demonstrations as rows of a train step, each process reading its own; what only policy gradients read is
    zero."""
    rows = layout.sharding("rows")
    local_B = distributed.local_rows(rows, count)
    demos = source.batch(cursor, count, local_B)
    mask_BC = np.asarray(completion_mask(demos.completion_lengths_B, source.completion_width))
    zeros_BC = np.zeros(mask_BC.shape, np.float32)
    arrays = (demos.tokens_BT, demos.prompt_lengths_B, demos.completion_lengths_B, mask_BC, zeros_BC)
    *frames, mask_BC, zeros_BC = distributed.put_rows(rows, local_B, count, *arrays)
    return Batch(*frames, LossInputs(logp_BC=None, old_logp_BC=zeros_BC, advantages_BC=zeros_BC, mask_BC=mask_BC))
