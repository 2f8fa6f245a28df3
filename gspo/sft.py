"""Supervised fine-tuning on demonstrations: the cold start of a policy. It stops early on purpose (pass@1 of 0.1 to
0.6; `target_pass_at_1`), since reinforcement learning needs groups in which some completions are right and some are
wrong. The loss is on completion tokens alone; for a Mixture of Experts the routers' losses come on top.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from gspo import plans, supervised_plans
from gspo.data.batches import DemonstrationSource
from gspo.data.tokenizer import Tokenizer
from gspo.evaluate import describe_scorer, make_evaluator
from gspo.generate import check_splits, make_task
from gspo.learning.learner import make_train_step
from gspo.learning.scores import make_scorer
from gspo.learning.state import shardings_of, state_on_mesh
from gspo.masked import Mean, added, masked_mean, values
from gspo.model.distribution import Sampling
from gspo.model.transformer import Transformer
from gspo.objectives import negative_log_likelihood
from gspo.parallel import distributed
from gspo.parallel.sharding import Layout
from gspo.resume import tokenizer_of_run
from gspo.steps import check_rows, make_layout, make_model, optimizer_of
from gspo.supervised import Course, run
from gspo.types import Batch, LossInputs, Params, TrainState, UserError, completion_mask


def train(
    plan: supervised_plans.SFTPlan, workdir: str, *, allow_changed_config: bool = False, title: str = "SFT"
) -> dict[str, Any]:
    """Runs, or resumes, supervised fine-tuning in workdir. Returns the last line of its metrics. Raises UserError."""
    # ------------------------------------------------------------------ layout, data, model
    micro = plan.update.micro_batch_size
    layout, tokenizer = make_layout(plan.mesh), tokenizer_of_run(plan)
    check_rows(layout, batch_size=micro or plan.batch_size)
    split_notes = check_splits(plan.data)
    source = demonstration_source(plan.data, tokenizer)
    model = make_model(plan.model, tokenizer, layout, plan.lora)
    optimizer, learning_rate = optimizer_of(plan.optimizer)
    start = state_on_mesh(layout, model, optimizer, lora=plan.lora)
    shardings = shardings_of(layout, start.abstract)
    train_step = make_train_step(model, optimizer, negative_log_likelihood, plan.update, state_shardings=shardings)
    evaluate = make_evaluator(plan, model, tokenizer)
    evaluation_loss, loss_notes = make_evaluation_loss(plan, model, tokenizer)

    # ------------------------------------------------------------------ loop
    def update(state: TrainState, cursor: int):
        if plan.packing:
            batch, behind = make_packed_batch(layout, source, cursor, plan.batch_size)
        else:
            batch, behind = make_batch(layout, source, cursor, plan.batch_size), cursor + plan.batch_size
        return *train_step(state, batch), behind

    def evaluated(state: TrainState):
        line, samples = evaluate(state.policy)
        return line | evaluation_loss(state.policy), samples

    def reached(line: dict[str, Any]) -> str:
        found, target = line["eval/pass@1"], plan.target_pass_at_1
        return f"eval/pass@1 {found:.3f}" if target is not None and found >= target else ""

    notes = [*split_notes, *describe_scorer(plan, source.task), *loss_notes]
    if source.num_dropped:
        notes.append(f"{source.num_dropped} examples longer than the frame were dropped")
    course = Course(start, model, tokenizer, update, evaluated, learning_rate, notes, reached=reached)
    return run(plan, workdir, course, allow_changed_config=allow_changed_config, title=title)


def demonstration_source(
    plan: plans.DataPlan, tokenizer: Tokenizer, split: str = "", overlong: str = ""
) -> DemonstrationSource:
    """Those of the plan's train_split, with its policy for overlong ones; or of another split, by another policy."""
    return DemonstrationSource(
        make_task(plan, split or plan.train_split),
        tokenizer,
        max_prompt_length=plan.max_prompt_length,
        max_completion_length=plan.max_completion_length,
        overlong=overlong or plan.overlong_prompts,
        seed=plan.seed,
    )


def make_batch(layout: Layout, source: DemonstrationSource, cursor: int, count: int) -> Batch:
    """The demonstrations at positions cursor .. cursor + count - 1 of the run, as the rows of a train step."""
    return _rows(layout, source, cursor, count, counted=count)


def make_packed_batch(layout: Layout, source: DemonstrationSource, cursor: int, count: int) -> tuple[Batch, int]:
    """As many demonstrations from `cursor` on as find room in `count` rows, and the cursor behind them.

    The frame is one of P = 1, whose mask says which tokens are imitated. The routers' balance loss of a row is then
    over all its demonstrations together."""
    rows = layout.sharding("rows")
    local_B = distributed.local_rows(rows, count)
    packed = source.packed(cursor, count, local_B)
    mask_BC, ones_B = packed.completion_BT[:, 1:], np.ones_like(packed.used_B)
    arrays = (packed.tokens_BT, ones_B, packed.used_B - 1, packed.segments_BT, mask_BC, mask_BC * np.float32(0))
    *frames, segments_BT, mask_BC, zeros_BC = distributed.put_rows(rows, local_B, count, *arrays)
    inputs = LossInputs(logp_BC=None, old_logp_BC=zeros_BC, advantages_BC=zeros_BC, mask_BC=mask_BC)
    return Batch(*frames, inputs, segments_BT=segments_BT), packed.next_cursor


def _rows(layout: Layout, source: DemonstrationSource, cursor: int, count: int, counted: int) -> Batch:
    """`count` demonstrations, each process reading its own; what only policy gradients read is zero. Those behind the
    first `counted` have an empty mask."""
    rows = layout.sharding("rows")
    local_B = distributed.local_rows(rows, count)
    demos = source.batch(cursor, count, local_B)
    mask_BC = np.array(completion_mask(demos.completion_lengths_B, source.completion_width))
    mask_BC &= (local_B < counted)[:, None]
    zeros_BC = np.zeros(mask_BC.shape, np.float32)
    arrays = (demos.tokens_BT, demos.prompt_lengths_B, demos.completion_lengths_B, mask_BC, zeros_BC)
    *frames, mask_BC, zeros_BC = distributed.put_rows(rows, local_B, count, *arrays)
    return Batch(*frames, LossInputs(logp_BC=None, old_logp_BC=zeros_BC, advantages_BC=zeros_BC, mask_BC=mask_BC))


def make_evaluation_loss(
    plan: supervised_plans.SFTPlan, model: Transformer, tokenizer: Tokenizer
) -> tuple[Callable[[Params], dict[str, float]], list[str]]:
    """`loss(params) -> {"eval/loss": nats per completion token}` over eval.num_prompts demonstrations of the evaluation
    split, always the same ones, without the routers' losses; and lines for the log. {} where the split has no
    demonstrations that fit.
    """
    try:
        source = demonstration_source(plan.data, tokenizer, plan.data.eval_split, overlong="drop")
    except UserError as error:
        return lambda params: {}, [f"no eval/loss: {error}"]
    notes = [f"eval/loss leaves out {source.num_dropped} examples longer than the frame"] * bool(source.num_dropped)
    layout, count, width = model.layout, min(plan.evaluation.num_prompts, len(source)), plan.batch_size
    scorer = make_scorer(
        model,
        completion_width=source.completion_width,
        sampling=Sampling(),
        chunk=plan.update.chunk,
        micro_batch_size=plan.update.micro_batch_size,
        keep=("logp_BC",),
    )

    @partial(jax.jit, out_shardings=layout.sharding())
    def loss_of(params: Params, batch: Batch) -> Mean:
        logp_BC = scorer(params, batch.tokens_BT, batch.prompt_lengths_B).logp_BC
        return masked_mean(-logp_BC, batch.inputs.mask_BC)

    def loss(params: Params) -> dict[str, float]:
        batches = (_rows(layout, source, at, width, count - at) for at in range(0, count, width))
        return values(added([{"eval/loss": jax.device_get(loss_of(params, batch))} for batch in batches]))

    return loss, notes
