"""Supervised fine-tuning on demonstrations: the cold start of a policy. It stops early on purpose (pass@1 of 0.1 to
0.6), since reinforcement learning needs groups in which some completions are right and some are wrong.
"""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gspo import build
from gspo.data.batches import DemonstrationSource
from gspo.evaluate import make_evaluator
from gspo.learning.learner import make_train_step, negative_log_likelihood
from gspo.parallel import distributed
from gspo.parallel.sharding import Layout
from gspo.run.checkpoint import Checkpointer
from gspo.run.cli import StopSignal
from gspo.run.progress import Progress, Timer
from gspo.run.workdir import open_workdir
from gspo.run.writers import MetricsWriter
from gspo.types import Batch, UserError, completion_mask

STOP_EVERY = 5  # updates between looks at whether any process was asked to stop: they all must take part


def train(
    config: ConfigDict, workdir: str, *, allow_changed_config: bool = False, title: str = "SFT"
) -> dict[str, Any]:
    """Runs, or resumes, supervised fine-tuning in workdir. Returns the last line of its metrics. Raises UserError."""
    # ------------------------------------------------------------------ config, layout, data, model
    micro = build.micro_batch_size(config, config.batch_size, "a batch (batch_size)")
    layout = build.layout(config)
    build.check_rows(layout, batch_size=micro or config.batch_size)
    tokenizer = build.tokenizer(config)
    source = build.demonstration_source(config, tokenizer)
    model = build.model(config, tokenizer, layout)
    optimizer, learning_rate = build.optimizer(config, total_steps=config.num_updates)
    init, abstract = build.state_on_mesh(layout, model, optimizer)
    train_step = make_train_step(
        model, optimizer, negative_log_likelihood, micro_batch_size=micro, chunk=config.logp_chunk,
        state_shardings=build.shardings_of(layout, abstract),
    )  # fmt: skip
    evaluate = make_evaluator(config, layout, model, tokenizer)

    # ------------------------------------------------------------------ state
    open_workdir(workdir, config.to_dict(), allow_changed_config=allow_changed_config, check_only=True)
    checkpointer = Checkpointer(
        workdir, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best, best_metric="eval/pass@1"
    )
    writer = MetricsWriter(workdir, tensorboard=config.log.tensorboard, wandb=config.log.wandb, config=config.to_dict())
    restored = checkpointer.restore(abstract)
    if restored is None:
        first, state = 0, build.initial_state(config, init, abstract)
        writer.truncate(None)
    else:
        first, state, meta = restored
        writer.truncate(meta["offsets"])
    open_workdir(
        workdir, config.to_dict(), allow_changed_config=allow_changed_config
    )  # nothing failed: from now on it is this run's
    progress = Progress(config.num_updates, start=first, title=title)
    progress.note(build.describe(model, abstract))
    if source.num_dropped:
        progress.note(f"{source.num_dropped} examples longer than the frame were dropped")
    if restored is not None:
        progress.note(f"resumed at update {first}")

    # ------------------------------------------------------------------ loop
    timer = Timer()
    with StopSignal() as stop, progress, checkpointer, writer:
        for index in range(first, config.num_updates + 1):
            last = index == config.num_updates
            line, samples = {}, []
            if last or (config.eval.every and index % config.eval.every == 0):
                with timer("eval"):
                    line, samples = evaluate(state.params)
            due = config.checkpoint.every and index % config.checkpoint.every == 0
            stopping = (index % STOP_EVERY == 0 or jax.process_count() == 1) and distributed.any_process(stop.requested)
            if stopping or (index > first and (last or due)):
                checkpointer.save(index, state, {"offsets": writer.offset()}, line)
            if stopping and not last:
                checkpointer.wait()
                raise stop.leave(f"saved update {index} in {workdir}; start the same command again to go on")
            writer.write_samples(
                index, samples[: config.log.num_samples]
            )  # after the save, like all that a resume does again
            if last:
                writer.write(index, line)
                progress.update(index, line)
                break

            with timer("update"):
                state, metrics = train_step(state, make_batch(config, layout, source, index * config.batch_size))
                metrics = jax.device_get(metrics)
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


def make_batch(config: ConfigDict, layout: Layout, source: DemonstrationSource, cursor: int) -> Batch:
    """Demonstrations as rows of a train step, each process reading its own; what only policy gradients read is zero."""
    rows, count = layout.sharding("rows"), config.batch_size
    own_B = distributed.own_rows(rows, count)
    demos = source.batch(cursor, count, own_B)
    mask_BC = np.asarray(completion_mask(demos.completion_lengths_B, config.max_completion_length))
    zeros_BC = np.zeros(mask_BC.shape, np.float32)
    return Batch(*distributed.put_rows(
        rows, own_B, count, demos.tokens_BT, demos.prompt_lengths_B, demos.completion_lengths_B, mask_BC, zeros_BC, zeros_BC
    ))  # fmt: skip
