"""Recorded rollouts, asked again: the gradient that each objective would have followed, at the policies of training,
and which tokens the variance of log w lies on.

    old policy   the parameters of the checkpoint before the recorded rollout k (for k = 0: those that the run began
                 with); old log-probs, advantages and masks are those of the record
    current      the run's own updates of rollout k are made again, from that checkpoint on the recorded rows; before
                 update j the parameters are those that update j started from in training
    per update   on its minibatch, for routing replay of the old policy's choices (R2) off and on, and for each
                 objective: the gradient by the learner's own code, before any limit on its norm

With replay on, only the passes that are measured replay: the parameters are those of the run as it was trained.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from gspo import objectives
from gspo.learning.learner import Update
from gspo.learning.scores import Scores
from gspo.plans import RLPlan
from gspo.report.gradients import Measure, cosines, kinds_of, make_measure, shares
from gspo.report.recorded import RecordedRun
from gspo.run import disk
from gspo.run.tokens import experts_changed
from gspo.steps import Steps, make_layout, make_steps, objective_settings, rows_per_prompt_of
from gspo.types import Batch, TrainState, UserError

MOST = 0.25  # the share of tokens that top_share is of
Row = dict[str, Any]
Settings = dict[str, dict[str, Any]]  # name of an objective -> all that it is made of

# ---------------------------------------------------------------------------- what is asked


class Asked(NamedTuple):
    """objectives: presets. epsilons: preset -> its clip range (below, above), over its paper's. updates: which of a
    rollout's are measured, from 0; (): the first two, a middle one, the last."""

    objectives: tuple[str, ...]
    epsilons: Mapping[str, tuple[float, float]]
    updates: tuple[int, ...]

    def presets(self) -> Settings:
        """Raises UserError for a name or a range that is none."""
        found = {}
        for name in self.objectives:
            low, high = self.epsilons.get(name, (None, None))
            try:
                found[name] = objectives.settings(name, epsilon=low, epsilon_high=high)
            except UserError as error:
                raise UserError(f"config.objectives: {error}") from None
        return found

    def settings(self, plan: RLPlan) -> Settings:
        """The presets, but the run's own where it is of one of them."""
        found = self.presets()
        return found | ({plan.preset: objective_settings(plan)} if plan.preset in found else {})

    def updates_of(self, plan: RLPlan) -> tuple[int, ...]:
        N = plan.updates_per_rollout
        return self.updates or tuple(sorted({0, min(1, N - 1), N // 2, N - 1}))

    def check(self, run: RecordedRun) -> None:
        """Raises UserError for what cannot be asked of this run."""
        N, known = run.plan.updates_per_rollout, run.record(next(iter(run.files))).columns
        if not set(self.updates) <= set(range(N)):
            raise UserError(
                f"config.updates={self.updates}: {run.folder} has {N} updates per rollout; give numbers from 0 on"
            )
        for name, settings in self.settings(run.plan).items():
            for need in objectives.make_objective(**settings).needs:
                if need.rpartition("_")[0] not in known:
                    raise UserError(
                        f"config.objectives: {name!r} needs {need}, of which {run.folder} has no record; leave it out"
                    )

    def digest(self, run: RecordedRun, rollout: int) -> str:
        """Of all that the rows of a rollout depend on: what is asked, the run's config, the record."""
        asked = (self.settings(run.plan), self.updates_of(run.plan), run.plan.written)
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
        for path in run.files[rollout]:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def measured_once(path: Path, digest: str, measure: Callable[[], list[Row]]) -> list[Row]:
    """The rows in the file, if they answer to this digest; else those of measure(), which are put there."""
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("asked") == digest:
        return known["rows"]
    rows = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_whole(path, json.dumps({"asked": digest, "rows": rows}))
    return rows


# ---------------------------------------------------------------------------- compiled once


class Programs:
    """Jitted functions, each made once for all runs that have it in common."""

    def __init__(self) -> None:
        self._steps: list[tuple[RLPlan, Steps]] = []
        self._measures: dict[tuple, Measure] = {}

    def steps(self, run: RecordedRun) -> Steps:
        """The same for all seeds of an arm."""
        data = dataclasses.replace(run.plan.data, seed=0)
        alike = dataclasses.replace(run.plan, data=data, seed=0, init_from="", missing="", date=None, written={})
        for plan, steps in self._steps:
            if plan == alike:
                return steps
        steps = make_steps(run.plan, make_layout(run.plan.mesh), run.tokenizer)
        self._steps.append((alike, steps))
        return steps

    def measure(self, run: RecordedRun, settings: Settings) -> Measure:
        """The same for all arms with this model, these updates and these objectives."""
        plan, steps = run.plan, self.steps(run)
        rows = rows_per_prompt_of(plan, steps.layout)
        key = (steps.model, plan.update, steps.sampling, rows, json.dumps(settings, sort_keys=True))
        if key not in self._measures:
            made = [objectives.make_objective(**each) for each in settings.values()]
            update = Update(
                steps.model, optax.identity(), made[0], plan.update, steps.sampling, rows_per_prompt=rows
            )  # of which the gradient alone is asked, with each of the objectives
            self._measures[key] = make_measure(update, made)
        return self._measures[key]


# ---------------------------------------------------------------------------- a rollout


def rows_of_rollout(run: RecordedRun, rollout: int, asked: Asked, programs: Programs) -> list[Row]:
    """Makes the updates of a recorded rollout again, and measures before those that are asked for: a row for each
    update, replay and objective. Raises UserError where the record is not of the policy in the checkpoint.

    replay_error: the largest difference of a log-prob between the policy after the updates and the one on record; NaN
    where a run has made several passes over its rollouts, since these are made but once."""
    plan, steps, settings = run.plan, programs.steps(run), asked.settings(run.plan)
    measure, wanted = programs.measure(run, settings), asked.updates_of(plan)
    record, state = run.record(rollout), run.state_before(rollout, steps)
    batch = run.batch(record)
    frames = (jnp.asarray(batch.tokens_BT), jnp.asarray(batch.prompt_lengths_B))
    old = steps.scorer(state.policy, *frames)
    gaps = np.abs(np.asarray(old.logp_BC) - batch.inputs.old_logp_BC)[batch.inputs.mask_BC]
    if len(gaps) and np.quantile(gaps, 0.999, method="lower") > (plan.check_tolerance or 0.1):
        raise run.mistake(f"the record of rollout {rollout} is not of the policy in its checkpoint; remove it")
    routes = old.free_routes_LBTX
    replayed = routes if plan.experience.replay == "R2" else None
    batch = batch.replace(old_routes_LBTX=routes, replayed_routes_LBTX=replayed)
    rows = []
    for j, part in enumerate(steps.minibatches(batch)):
        if j in wanted:
            place = {"run": run.name, "seed": plan.seed, "rollout": rollout, "update": j}
            rows += [place | row for row in rows_of_update(state, part, measure, list(settings))]
        state, _ = steps.train_step(state, part)
    after = np.asarray(steps.scorer(state.policy, *frames, batch.replayed_routes_LBTX).logp_BC)
    real_BC = np.arange(after.shape[1]) < np.asarray(batch.completion_lengths_B)[:, None]
    error = float(np.abs(after[real_BC] - record.columns["after_logp"]).max())
    return [row | {"replay_error": error if plan.num_iterations == 1 else float("nan")} for row in rows]


def rows_of_update(state: TrainState, part: Batch, measure: Measure, names: list[str]) -> list[Row]:
    """A row for each replay and objective. With replay on, routed_var is the variance of what replay takes from log w:
    how far the changed experts move it, in the same tokens at the same parameters."""
    kinds_N, routes, free, rows = kinds_of(state.params), part.old_routes_LBTX, None, []
    for replay, given in (("off", None), ("on", routes))[: 1 if routes is None else 2]:
        part = part.replace(replayed_routes_LBTX=given)
        measured, scores = measure(state, part)
        common, free = of_ratios(part, scores, free), scores
        table = cosines(np.stack([gradient_N for gradient_N, _ in measured]))
        for name, (gradient_N, metrics), near in zip(names, measured, table.tolist(), strict=True):
            row = {"replay": replay, "objective": name, "grad_norm": float(np.linalg.norm(gradient_N))}
            row |= {f"cosine/{other}": value for other, value in zip(names, near, strict=True)}
            row |= {f"share/{kind}": share for kind, share in shares(gradient_N, kinds_N).items()}
            row |= {f"clipped_{unit}": metrics[f"clip_ratio/{unit}"] for unit in ("tokens", "sequences")}
            rows.append(row | {"ess": metrics["ess"]} | common)
    return rows


# ---------------------------------------------------------------------------- ratios of tokens


def of_ratios(part: Batch, scores: Scores, free: Scores | None) -> Row:
    """What the ratios of a minibatch's tokens are like, whatever the objective. free: the scores without replay."""
    mask_BC = np.asarray(part.inputs.mask_BC)
    logp_N = np.asarray(scores.logp_BC, np.float64)[mask_BC]
    log_w_N = logp_N - np.asarray(part.inputs.old_logp_BC)[mask_BC]
    row = {"token_ess": ess(log_w_N)}
    if free:
        row["routed_var"] = float(np.var(np.asarray(free.logp_BC)[mask_BC] - logp_N))
    if scores.free_routes_LBTX is None:
        return row
    old, new = np.asarray(part.old_routes_LBTX), np.asarray(scores.free_routes_LBTX)
    return row | split_variance(log_w_N, changes(old, new, mask_BC.shape[1])[mask_BC])


def ess(log_w_N: np.ndarray) -> float:
    """(Σ w)² / (n Σ w²), in (0, 1]: what share of the tokens an importance-weighted mean effectively uses."""
    w_N = np.exp(np.asarray(log_w_N, np.float64) - np.max(log_w_N))
    return float(w_N.sum() ** 2 / (len(w_N) * (w_N**2).sum()))


def split_variance(log_w_N: np.ndarray, changes_N: np.ndarray) -> dict[str, float]:
    """The variance of log w over tokens, by how many of a token's experts have changed.

    token_var      Var log w
    mean_changes   experts changed per token, of all layers
    changed_tokens share of tokens with a change
    changed_share  Σ_changed (x − mean)² / Σ (x − mean)²: what these tokens carry of it
    top_share      the same of the quarter of tokens with most changes; a quarter where the two are unrelated
    between_share  Σ_g n_g (mean_g − mean)² / Σ (x − mean)²: what the means of tokens with and without differ by
    within_changed, within_same
                   Σ_g (x − mean_g)² / Σ (x − mean)², so that between and within add up to 1
    Shares of the variance are NaN where nothing varies.
    """
    x_N, changed_N = np.asarray(log_w_N, np.float64), np.asarray(changes_N) > 0
    squared_N = (x_N - x_N.mean()) ** 2
    whole = squared_N.sum()
    groups = [x_N[changed_N], x_N[~changed_N]]
    within = [float(((g - g.mean()) ** 2).sum()) if len(g) else 0.0 for g in groups]
    between = sum(len(g) * (g.mean() - x_N.mean()) ** 2 for g in groups if len(g))
    share = lambda part: float(part / whole) if whole else float("nan")  # noqa: E731
    return {
        "token_var": float(whole / len(x_N)),
        "mean_changes": float(np.mean(changes_N)),
        "changed_tokens": float(changed_N.mean()),
        "changed_share": share(squared_N[changed_N].sum()),
        "top_share": share(sum_of_most(squared_N, changes_N, MOST * len(x_N))),
        "between_share": share(between),
        "within_changed": share(within[0]),
        "within_same": share(within[1]),
    }


def sum_of_most(values_N: np.ndarray, rank_N: np.ndarray, count: float) -> float:
    """The sum of values over the `count` elements of highest rank. Of those that tie at the edge, each counts alike, in
    part."""
    total = 0.0
    for rank in np.unique(rank_N)[::-1]:
        tied = np.asarray(values_N)[np.asarray(rank_N) == rank]
        taken = min(count, len(tied))
        total, count = total + taken * float(tied.mean()), count - taken
    return total


def changes(old_LBTX: np.ndarray, new_LBTX: np.ndarray, completion_width: int) -> np.ndarray:
    """[B, C] how many experts, of all layers, are others than before where a token is predicted."""
    changed_BT = experts_changed(old_LBTX, new_LBTX).sum(axis=0, dtype=np.int64)
    T = changed_BT.shape[1]
    return changed_BT[:, T - completion_width - 1 : T - 1]
