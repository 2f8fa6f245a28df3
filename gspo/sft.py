"""Supervised fine-tuning on demonstrations: the cold start of a policy. It stops early on purpose (pass@1 of 0.1 to
0.6), since reinforcement learning needs groups in which some completions are right and some are wrong.
"""

from typing import Any

import jax
import numpy as np

from gspo import plans
from gspo.data.batches import DemonstrationSource
from gspo.evaluate import make_evaluator
from gspo.generate import check_splits, make_task
from gspo.learning.learner import make_train_step
from gspo.learning.state import shardings_of, state_on_mesh
from gspo.masked import values
from gspo.objectives import negative_log_likelihood
from gspo.parallel import distributed
from gspo.parallel.sharding import Layout
from gspo.resume import open_run, tokenizer_of_run
from gspo.run.cli import StopSignal
from gspo.run.progress import Progress, Timer, is_due
from gspo.steps import check_rows, describe, describe_adapters, make_layout, make_model, optimizer_of
from gspo.types import Batch, LossInputs, UserError, completion_mask

STOP_EVERY = 5  # updates between looks at whether any process was asked to stop: they all must take part


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
    model = make_model(plan.model, tokenizer, layout, plan.lora)
    optimizer, learning_rate = optimizer_of(plan.optimizer)
    start = state_on_mesh(layout, model, optimizer, lora=plan.lora)
    shardings = shardings_of(layout, start.abstract)
    train_step = make_train_step(model, optimizer, negative_log_likelihood, plan.update, state_shardings=shardings)
    evaluate = make_evaluator(plan, model, tokenizer)

    # ------------------------------------------------------------------ state
    opened = open_run(plan, workdir, start, model.spec, tokenizer, allow_changed_config=allow_changed_config)
    checkpointer, writer, first, state = opened.checkpointer, opened.writer, opened.first, opened.state
    progress = Progress(plan.num_updates, start=first, title=title)
    adapters = [describe_adapters(plan.lora, start.abstract)] if plan.lora else []
    for note in (describe(model, start.abstract), *adapters, *split_notes):
        progress.note(note)
    if source.num_dropped:
        progress.note(f"{source.num_dropped} examples longer than the frame were dropped")
    if opened.resumed:
        progress.note(f"resumed at update {first}")

    # ------------------------------------------------------------------ loop
    timer = Timer()
    with StopSignal() as stop, progress, opened.held:
        for index in range(first, plan.num_updates + 1):
            last = index == plan.num_updates
            line, samples = {}, []
            if last or is_due(index, plan.evaluation.every):
                with timer("eval"):
                    line, samples = evaluate(state.policy)
            looking = index % STOP_EVERY == 0 or jax.process_count() == 1
            stopping = looking and distributed.any_process(stop.requested)
            if stopping or (index > first and (last or is_due(index, plan.checkpoint.every))):
                checkpointer.save(index, state.saved, {"offsets": writer.offset()}, line)
            if stopping and not last:
                checkpointer.wait()
                raise stop.leave(f"saved update {index} in {workdir}; start the same command again to go on")
            # After the save, like all that a resume does again.
            writer.write_samples(index, samples[: plan.log.num_samples])
            if last:
                writer.write(index, line)
                progress.update(index, line)
                break

            with timer("update"):
                batch = make_batch(layout, source, index * plan.batch_size, plan.batch_size)
                state, metrics = train_step(state, batch)
                metrics = values(jax.device_get(metrics))
            if not np.isfinite(metrics["loss"] + metrics["grad_norm"]):
                raise UserError(
                    f"update {index}: loss or gradient is not finite{checkpointer.last_good()}; lower "
                    "optimizer.learning_rate"
                )
            line |= metrics | {"learning_rate": float(learning_rate(index))}
            writer.write(index, line)
            writer.write_timings(index, timer.take())
            progress.update(index, line)
    return line


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
