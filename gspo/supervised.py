"""The loop of training on given data, whatever the loss: demonstrations (`gspo.sft`), preferences (`gspo.reward_model`,
`gspo.dpo`). What differs is what one update does, and what an evaluation measures.

The data position is one integer. A run that is killed anywhere and started again ends bit-equal to one that was not.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gspo.data.tokenizer import Tokenizer
from gspo.held import describe_trees, trees_of
from gspo.learning.state import Start
from gspo.masked import Metrics, values
from gspo.model.transformer import Transformer
from gspo.parallel import distributed
from gspo.resume import open_run
from gspo.run.cli import StopSignal
from gspo.run.progress import SHOWN, Progress, Timer, is_due
from gspo.steps import describe, describe_adapters
from gspo.supervised_plans import SupervisedPlan
from gspo.types import TrainState, UserError

STOP_EVERY = 5  # updates between looks at whether any process was asked to stop: they all must take part


class Course(NamedTuple):
    """What is trained, and how.

    model          the policy, or what a reward model has its body from
    update         (state, cursor) -> (state, metrics, cursor behind the examples that it took)
    evaluate       state -> (metrics, samples)
    learning_rate  of an update
    notes          lines for the log, behind those on the model
    reached        metrics of an evaluation -> why the run ends with it; "" where it goes on
    remembered     state -> JSON values that are saved beside it
    shown          (column, metric, format) of the display
    """

    start: Start
    model: Transformer
    tokenizer: Tokenizer
    update: Callable[[TrainState, int], tuple[TrainState, Metrics, int]]
    evaluate: Callable[[TrainState], tuple[dict[str, Any], list[dict[str, Any]]]]
    learning_rate: Callable[[int], Any]
    notes: Sequence[str] = ()
    reached: Callable[[dict[str, Any]], str] = lambda line: ""
    remembered: Callable[[TrainState], dict[str, Any]] = lambda state: {}
    shown: Sequence[tuple[str, str, str]] = SHOWN


def run(
    plan: SupervisedPlan, workdir: str, course: Course, *, allow_changed_config: bool, title: str
) -> dict[str, Any]:
    """Runs, or resumes, plan.num_updates updates in workdir. Returns the last line of its metrics. Raises UserError."""
    start, spec = course.start, course.model.spec
    opened = open_run(plan, workdir, start, spec, course.tokenizer, allow_changed_config=allow_changed_config)
    checkpointer, writer, first, state = opened.checkpointer, opened.writer, opened.first, opened.state
    progress = Progress(plan.num_updates, start=first, title=title, shown=course.shown)
    adapters = [describe_adapters(plan.lora, start.abstract)] if plan.lora else []
    resumed = [f"resumed at update {first}"] if opened.resumed else []
    held = describe_trees(trees_of(start.abstract, plan.kind))
    for note in (describe(course.model, start.abstract), *adapters, *held, *course.notes, *resumed):
        progress.note(note)
    cursor = opened.meta.get("cursor", first * plan.batch_size)  # examples that the run has consumed

    timer = Timer()
    with StopSignal() as stop, progress, opened.held:
        for index in range(first, plan.num_updates + 1):
            last = index == plan.num_updates
            line, samples = {}, []
            if last or is_due(index, plan.evaluation.every):
                with timer("eval"):
                    line, samples = course.evaluate(state)
                why = course.reached(line)
                if why:
                    last = True  # a run that has ended and is started again ends here once more
                    progress.note(f"{why} at update {index}: the target is reached")
            looking = index % STOP_EVERY == 0 or jax.process_count() == 1
            stopping = looking and distributed.any_process(stop.requested)
            if stopping or last or (index > first and is_due(index, plan.checkpoint.every)):
                meta = {"cursor": cursor, "offsets": writer.offset()} | course.remembered(state)
                ranked = {name: value for name, value in line.items() if isinstance(value, int | float)}
                checkpointer.save(index, state.saved, meta, ranked)
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
                state, metrics, cursor = course.update(state, cursor)
                metrics = values(jax.device_get(metrics))
            if not np.isfinite(metrics["loss"] + metrics["grad_norm"]):
                raise UserError(
                    f"update {index}: loss or gradient is not finite{checkpointer.last_good()}; lower "
                    "optimizer.learning_rate"
                )
            line |= metrics | {"learning_rate": float(course.learning_rate(index))}
            writer.write(index, line)
            writer.write_timings(index, timer.take())
            progress.update(index, line)
    return line
