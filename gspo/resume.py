"""A run begins, or goes on where it was stopped: its folder, its checkpoints, its state, its files of metrics."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gspo import plans
from gspo.data.tokenizer import Tokenizer, save_files
from gspo.learning.state import Start
from gspo.model.spec import ModelSpec
from gspo.parallel import distributed
from gspo.run.checkpoint import Checkpointer, restore_base, save_base
from gspo.run.identity import TOKENIZER, check_adapters, check_identity, dated_tokenizer, identity
from gspo.run.workdir import hold_workdir, keep_config
from gspo.run.writers import MetricsWriter
from gspo.steps import initial_state
from gspo.types import TrainState, UserError


class Opened(NamedTuple):
    checkpointer: Checkpointer
    writer: MetricsWriter
    first: int  # the rollout or update to begin with
    state: TrainState
    meta: dict[str, Any]  # what was saved beside the state; {} in a new run
    resumed: bool
    held: contextlib.ExitStack  # closes both, and lets other runs into the folder: the context of the loop


def tokenizer_of_run(plan: plans.PolicyPlan) -> Tokenizer:
    """UserError where the run is to begin from what cannot be read."""
    if plan.missing:
        raise UserError(f"init_from={plan.init_from}: {plan.missing}")
    return dated_tokenizer(plan.data.tokenizer, plan.date)


def open_run(
    plan: plans.RunPlan,
    workdir: str,
    start: Start,
    model: ModelSpec,
    tokenizer: Tokenizer,
    *,
    allow_changed_config: bool,
) -> Opened:
    """The state of the latest good checkpoint in workdir, or a fresh one; metrics are cut to what it had seen.

    No other run can use the folder until `held` is closed. It is claimed for this config only once nothing can fail any
    more. Raises UserError.
    """
    written, own = dict(plan.written), identity(model, tokenizer, kind=plan.kind, lora=plan.lora) | plan.beside_model
    check = partial(_check, own if start.begins_with is None else identity(model, tokenizer))
    with contextlib.ExitStack() as held:  # given back at once where anything fails
        held.enter_context(hold_workdir(workdir, written, allow_changed_config=allow_changed_config))
        checkpointer = Checkpointer(
            workdir,
            keep_last=plan.checkpoint.keep_last,
            keep_best=plan.checkpoint.keep_best,
            best_metric=plan.best_metric,
            identity=own,
        )
        held.enter_context(checkpointer)
        log = plan.log
        loggers = {"tensorboard": log.tensorboard, "wandb": log.wandb}
        loggers |= {"project": log.wandb_project, "name": log.wandb_name}
        writer = MetricsWriter(workdir, **loggers, config=written)
        held.enter_context(writer)
        restored = checkpointer.restore(start.abstract.saved, partial(_check_own, own))
        first, state, meta = (0, initial_state(plan, start, check), {}) if restored is None else restored
        if plan.lora and restored is None:
            save_base(workdir, state.frozen, own)
        elif plan.lora:
            state = state.replace(frozen=restore_base(workdir, start.abstract.frozen))
        keep_config(workdir, written)
        if restored is None:  # from now on its tokenizer lies beside its weights
            distributed.on_primary(
                lambda: _keep_tokenizer(tokenizer, Path(workdir) / TOKENIZER), f"writing to {workdir}"
            )
        writer.truncate(meta.get("offsets"))
        return Opened(checkpointer, writer, first, state, meta, restored is not None, held.pop_all())


def _check(own: dict[str, Any], where: Path, saved: dict[str, Any] | None) -> None:
    check_identity(where, saved, own)


def _check_own(own: dict[str, Any], where: Path, saved: dict[str, Any] | None) -> None:
    """As `_check`, of a run that goes on; and that its plan knows the day on which it began, which prompts may bear."""
    check_identity(where, saved, own)
    check_adapters(where, saved, own)
    if saved is not None and saved.get("date") not in (None, own["date"]):
        raise UserError(f"{where}: the run began on {saved['date']}, not {own['date']}; make the plan with its workdir")


def _keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    try:
        save_files(tokenizer, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
