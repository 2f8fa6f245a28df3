"""Runs whose tokens are on record, with the policies they were drawn from: opened, checked, and a rollout as the batch
that its learner saw."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gspo.data.tokenizer import Tokenizer
from gspo.plans import RLPlan
from gspo.run import tokens
from gspo.run.checkpoint import restore_state
from gspo.run.identity import dated_tokenizer
from gspo.steps import Steps, initial_state
from gspo.types import Batch, LossInputs, TrainState, UserError


class RecordedRun(NamedTuple):
    """name: the arm that it is a seed of. files: rollout -> those of its record."""

    name: str
    folder: Path
    plan: RLPlan
    tokenizer: Tokenizer
    files: dict[int, list[Path]]

    def record(self, rollout: int) -> tokens.Record:
        """Raises UserError for a record that cannot be read, or is of another run."""
        try:
            record = tokens.read(self.files[rollout])
        except UserError as error:
            raise self.mistake(error) from None
        objective = json.loads(json.dumps(dict(self.plan.objective)))
        if record.about["rollout"] != rollout or record.about["objective"] != objective:
            raise self.mistake(f"the record of rollout {rollout} is of another run; remove it")
        return record

    def state_before(self, rollout: int, steps: Steps) -> TrainState:
        """What the run went into the rollout with. Raises UserError where its checkpoint is of something else."""
        if not rollout:
            return initial_state(self.plan, steps.start)
        try:
            return restore_state(self.folder / "checkpoints" / str(rollout), steps.abstract.saved)
        except UserError as error:
            raise self.mistake(f"{error}; or remove the record of rollout {rollout}") from None

    def batch(self, record: tokens.Record) -> Batch:
        """The rollout as the learner saw it, without routes. Raises UserError."""
        data, pad_id = self.plan.data, self.tokenizer.pad_id
        try:
            return batch_of(record, data.max_prompt_length, data.max_completion_length, pad_id)
        except ValueError as error:
            raise self.mistake(f"the record of rollout {record.about['rollout']} {error}") from None

    def mistake(self, text: object) -> UserError:
        return UserError(f"config.rollouts={self.folder}: {text}")


def opened(name: str, folder: Path, plan: RLPlan) -> RecordedRun:
    """Raises UserError for a run without records, one that cannot be made again, and for the first record that cannot
    be read, is of another run, or whose policy is gone."""
    run = RecordedRun(name, folder, plan, dated_tokenizer(plan.data.tokenizer, plan.date), tokens.files(folder))
    if not run.files:
        raise run.mistake("it has no record of tokens; train it with --config.log.tokens_every=N")
    if plan.critic or plan.experience.replay == "R3" or plan.rollout.stale_rollouts or plan.lora:
        raise run.mistake("runs with a critic, R3, stale rollouts or adapters cannot be made again; name others")
    for rollout in run.files:
        run.batch(run.record(rollout))
        if rollout and not (folder / "checkpoints" / str(rollout)).is_dir():
            raise run.mistake(
                f"the checkpoint of rollout {rollout} is gone; train with checkpoint.every and checkpoint.keep_last "
                "that keep it, or remove the record"
            )
    return run


def batch_of(record: tokens.Record, prompt_width: int, completion_width: int, pad_id: int) -> Batch:
    """A rollout as a batch, without routes. Raises ValueError where the rows do not fit the frames, or are not all
    there."""
    c, starts = record.columns, record.starts
    B, P, C = len(c["row"]), prompt_width, completion_width
    if not np.array_equal(c["row"], np.arange(B)):
        raise ValueError("lacks rows; gather the files of all processes")
    if not B or c["length"].max() > C or c["prompt_length"].max() > P:
        raise ValueError("does not fit the frames of the config; it is of another run")
    tokens_BT = np.full((B, P + C), pad_id, np.int32)
    prompts = record.prompts
    real_BC = np.arange(C) < c["length"][:, None]
    for row, group in enumerate(c["group"]):
        ids = prompts[int(group)]
        tokens_BT[row, P - len(ids) : P] = ids
        tokens_BT[row, P : P + c["length"][row]] = c["token"][starts[row] : starts[row + 1]]

    def frame(name: str) -> np.ndarray | None:
        if name not in c:
            return None
        out_BC = np.zeros((B, C), c[name].dtype)
        out_BC[real_BC] = c[name]
        return out_BC

    inputs = LossInputs(
        logp_BC=None,
        old_logp_BC=frame("old_logp"),
        advantages_BC=frame("advantage"),
        mask_BC=frame("mask"),
        ref_logp_BC=frame("ref_logp"),
        sampler_logp_BC=frame("sampler_logp"),
    )
    lengths_B = np.array([len(prompts[int(group)]) for group in c["group"]], np.int32)
    return Batch(tokens_BT, lengths_B, c["length"].astype(np.int32), inputs)
