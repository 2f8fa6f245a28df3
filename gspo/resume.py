"""A run begins, or goes on where it was stopped: its folder, its checkpoints, its state, its files of metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

from gspo import plans
from gspo.run.checkpoint import Checkpointer
from gspo.run.workdir import open_workdir
from gspo.run.writers import MetricsWriter
from gspo.types import TrainState


class Opened(NamedTuple):
    checkpointer: Checkpointer
    writer: MetricsWriter
    first: int  # the rollout or update to begin with
    state: TrainState
    meta: dict[str, Any]  # what was saved beside the state; {} in a new run
    resumed: bool


def open_run(
    plan: plans.RunPlan,
    workdir: str,
    abstract: TrainState,
    fresh: Callable[[], TrainState],
    *,
    allow_changed_config: bool,
) -> Opened:
    """The state of the latest good checkpoint in workdir, or a fresh one; metrics are cut to what it had seen.

    The folder is claimed for this config only once nothing can fail any more. Raises UserError.
    """
    claim = {"config": dict(plan.written), "allow_changed_config": allow_changed_config}
    open_workdir(workdir, **claim, check_only=True)
    checkpointer = Checkpointer(
        workdir,
        keep_last=plan.checkpoint.keep_last,
        keep_best=plan.checkpoint.keep_best,
        best_metric="eval/pass@1",
    )
    writer = MetricsWriter(workdir, tensorboard=plan.log.tensorboard, wandb=plan.log.wandb, config=dict(plan.written))
    restored = checkpointer.restore(abstract)
    first, state, meta = (0, fresh(), {}) if restored is None else restored
    open_workdir(workdir, **claim)
    writer.truncate(meta.get("offsets"))
    return Opened(checkpointer, writer, first, state, meta, restored is not None)
