"""A run begins, or goes on where it was stopped: its folder, its checkpoints, its state, its files of metrics."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from gspo import plans
from gspo.run.checkpoint import Checkpointer
from gspo.run.workdir import hold_workdir, keep_config
from gspo.run.writers import MetricsWriter
from gspo.types import TrainState


class Opened(NamedTuple):
    checkpointer: Checkpointer
    writer: MetricsWriter
    first: int  # the rollout or update to begin with
    state: TrainState
    meta: dict[str, Any]  # what was saved beside the state; {} in a new run
    resumed: bool
    held: contextlib.ExitStack  # closes both, and lets other runs into the folder: the context of the loop


def open_run(
    plan: plans.RunPlan,
    workdir: str,
    abstract: TrainState,
    fresh: Callable[[], TrainState],
    *,
    allow_changed_config: bool,
) -> Opened:
    """The state of the latest good checkpoint in workdir, or a fresh one; metrics are cut to what it had seen.

    No other run can use the folder until `held` is closed. It is claimed for this config only once nothing can fail any
    more. Raises UserError.
    """
    written = dict(plan.written)
    with contextlib.ExitStack() as held:  # given back at once where anything fails
        held.enter_context(hold_workdir(workdir, written, allow_changed_config=allow_changed_config))
        checkpointer = Checkpointer(
            workdir,
            keep_last=plan.checkpoint.keep_last,
            keep_best=plan.checkpoint.keep_best,
            best_metric="eval/pass@1",
        )
        held.enter_context(checkpointer)
        writer = MetricsWriter(workdir, tensorboard=plan.log.tensorboard, wandb=plan.log.wandb, config=written)
        held.enter_context(writer)
        restored = checkpointer.restore(abstract)
        first, state, meta = (0, fresh(), {}) if restored is None else restored
        keep_config(workdir, written)
        writer.truncate(meta.get("offsets"))
        return Opened(checkpointer, writer, first, state, meta, restored is not None, held.pop_all())
