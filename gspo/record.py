"""A rollout's tokens on record: what each update saw of them, what the routers chose, what the updates made of them.

    before each update   its minibatch is scored with the parameters that the update starts from (of several passes over
                         the rollout, in the first)
    after the last       all minibatches are scored once more
    then                 columns of tokens are written (`gspo.run.tokens` says which)

That is two forward passes over the rollout, where a rollout is recorded; the updates themselves are the same programs
on the same arrays, and a run that records ends with the same bits as one that does not.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gspo import plans
from gspo.collect import Experience
from gspo.learning.scores import Scores
from gspo.parallel import distributed
from gspo.run import disk, tokens
from gspo.run.progress import is_due
from gspo.steps import Steps
from gspo.types import Batch, Params


class Recorder:
    """Starts the records of a run; those of rollout `first` and after it are removed, to be written again."""

    def __init__(self, plan: plans.RLPlan, steps: Steps, workdir: str, tokenizer: Any, first: int):
        self.every, self.steps, self.workdir = plan.log.tokens_every, steps, Path(workdir)
        spec = steps.model.spec
        self.about = {
            "updates": plan.updates_per_rollout,
            "num_generations": plan.rollout.num_generations,
            "tokenizer": tokenizer.spec,
            "eos_ids": [int(i) for i in tokenizer.eos_ids],
            "objective": dict(plan.objective),
            "layers": spec.num_layers - len(spec.dense_layers) if spec.num_experts else 0,
            "experts": spec.num_experts,
            "experts_per_token": spec.experts_per_token if spec.num_experts else 0,
        }
        self.columns = jax.jit(partial(columns_of, steps.layout))
        distributed.on_primary(partial(tokens.forget, self.workdir, first), f"opening {workdir}")

    def start(self, rollout: int, experience: Experience) -> "Recording | None":
        """The record of this rollout, where one is due."""
        return Recording(self, rollout, experience) if is_due(rollout, self.every) else None


class Recording:
    """The record of one rollout in the making: called before each update, finished after the last."""

    def __init__(self, recorder: Recorder, rollout: int, experience: Experience):
        self.recorder, self.rollout, self.experience = recorder, rollout, experience
        self.seen: list[tuple[Batch, Scores]] = []

    def __call__(self, params: Params, minibatch: Batch) -> None:
        """Notes what the policy makes of the next minibatch."""
        self.seen.append((minibatch, self._scores(params, minibatch)))

    def _scores(self, params: Params, part: Batch) -> Scores:
        replayed_LBTX = part.replayed_routes_LBTX
        return self.recorder.steps.recorder(params, part.tokens_BT, part.prompt_lengths_B, replayed_LBTX)

    def finish(self, params: Params) -> str:
        """Writes the record, with what the policy makes of all rows after the updates. Returns a line for the log."""
        recorder, parts = self.recorder, []
        for update, (minibatch, seen) in enumerate(self.seen):
            arrays = recorder.columns(minibatch, seen, self._scores(params, minibatch).logp_BC)
            parts.append(self._on_host(update, arrays))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        columns |= _prompts(columns.pop("prompt"), columns.pop("prompt_lengths"), columns["group"])
        about = {"rollout": self.rollout} | recorder.about
        path = tokens.write(recorder.workdir, jax.process_index(), about, columns)
        count, size = len(columns["token"]), path.stat().st_size
        return (
            f"{tokens.FOLDER}/{path.name}: {count:,} tokens of {len(columns['row'])} completions in "
            f"{disk.readable(size)}, {size / max(count, 1):.1f} bytes a token; one rollout in {recorder.every} is "
            "recorded"
        )

    def _on_host(self, update: int, arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        """Columns of the rows of one minibatch that lie on this process's devices."""
        B = arrays["lengths"].shape[0]
        local_B = distributed.local_rows(self.recorder.steps.layout.sharding("rows"), B)
        found = dict(zip(arrays, distributed.fetch_rows(local_B, *arrays.values()), strict=True))
        rows, lengths = update * B + local_B, found.pop("lengths")
        prompts = {name: found.pop(name) for name in ("prompt", "prompt_lengths")}
        real_BC = np.arange(found["token"].shape[1]) < lengths[:, None]
        of_rows = {
            "row": rows.astype(np.int32),
            "group": (rows // self.recorder.about["num_generations"]).astype(np.int32),
            "update": np.full(len(rows), update, np.int32),
            "length": lengths.astype(np.int32),
            "reward": self.experience.rewards_B[rows].astype(np.float32),
            "truncated": self.experience.truncated_B[rows].astype(bool),
        }
        return of_rows | prompts | {name: column[real_BC] for name, column in found.items()}


def columns_of(layout: Any, part: Batch, seen: Scores, after_BC: jax.Array) -> dict[str, jax.Array]:
    """What is recorded of a minibatch, as arrays with rows first, [B, C, ...]; and its prompts, [B, P]."""
    inputs, C = part.inputs, part.inputs.mask_BC.shape[1]
    P = part.tokens_BT.shape[1] - C
    predicting = slice(P - 1, P - 1 + C)  # the columns whose hidden states predict the completion
    by_row = lambda x_LBT: None if x_LBT is None else jnp.moveaxis(x_LBT[:, :, predicting], 0, 2)  # noqa: E731
    found = {
        "lengths": part.completion_lengths_B,
        "prompt_lengths": part.prompt_lengths_B,
        "prompt": part.tokens_BT[:, :P],
        "token": part.tokens_BT[:, P:],
        "mask": inputs.mask_BC,
        "advantage": inputs.advantages_BC,
        "sampler_logp": inputs.sampler_logp_BC,
        "old_logp": inputs.old_logp_BC,
        "logp": seen.logp_BC,
        "after_logp": after_BC,
        "ref_logp": inputs.ref_logp_BC,
        "entropy": seen.entropy_BC.astype(jnp.float16),
        "old_routes": by_row(part.old_routes_LBTX),
        "routes": by_row(seen.free_routes_LBTX),
        "margin": None if seen.margin_LBT is None else by_row(seen.margin_LBT).astype(jnp.float16),
    }
    return {name: layout.constrain(x, "rows", *(None,) * (x.ndim - 1)) for name, x in found.items() if x is not None}


def _prompts(prompt_BP: np.ndarray, lengths_B: np.ndarray, group_B: np.ndarray) -> dict[str, np.ndarray]:
    """The prompt of each group, once, without its padding on the left."""
    groups, rows = np.unique(group_B, return_index=True)
    ids = [prompt_BP[row, prompt_BP.shape[1] - lengths_B[row] :] for row in rows]
    return {
        "prompt_group": groups.astype(np.int32),
        "prompt_length": lengths_B[rows].astype(np.int32),
        "prompt_token": np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32),
    }
