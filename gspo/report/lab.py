"""Recorded rollouts, asked again: the gradient that each objective would have followed, at the policies of training.

    old policy   the parameters of the checkpoint before the recorded rollout k (for k = 0: those that the run began
                 with); old log-probs, advantages and masks are those of the record
    current      the run's own updates of rollout k are made again, from that checkpoint on the recorded rows; before
                 update j the parameters are those that update j started from in training
    per update   on its minibatch, for routing replay of the old policy's choices (R2) off and on, and for each
                 objective: the gradient by the learner's own code, before any limit on its norm

With replay on, only the passes that are measured replay: the parameters are those of the run as it was trained.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from gspo.learning.learner import Update, gradient_of, inputs_of
from gspo.learning.scores import Scores
from gspo.run.tokens import Record, experts_changed
from gspo.types import Batch, LossInputs, TrainState, UserError

KINDS = ("routers", "experts", "attention", "embeddings", "norms", "dense")  # of parameters


class Measured(NamedTuple):
    """What an objective makes of a minibatch: its gradient [N] float64, in the order of the leaves, and its metrics."""

    gradient_N: np.ndarray
    metrics: dict[str, float]


# ---------------------------------------------------------------------------- the record as a batch


def batch_of(record: Record, prompt_width: int, completion_width: int, pad_id: int) -> Batch:
    """The rollout as the learner sees it, without routes. Raises UserError where the rows do not fit the frames, or
    are not all there."""
    c, starts = record.columns, record.starts
    B, P, C = len(c["row"]), prompt_width, completion_width
    if not np.array_equal(c["row"], np.arange(B)):
        raise UserError("config.rollouts: a record lacks rows of its rollout; gather the files of all processes")
    if not B or c["length"].max() > C or c["prompt_length"].max() > P:
        raise UserError("config.rollouts: a record does not fit the frames of its run's config; it is of another run")
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


# ---------------------------------------------------------------------------- gradients by the learner's code


def make_measure(update: Update):
    """Returns measure(state, batch) -> (Measured, Scores on the host) for the objective of `update`; state is kept."""

    @jax.jit
    def of(state: TrainState, batch: Batch) -> tuple[Any, Scores, Any]:
        grads, scores = gradient_of(update, state, batch)
        return grads, scores, update.objective(inputs_of(scores, batch))[1]

    def measure(state: TrainState, batch: Batch) -> tuple[Measured, Scores]:
        grads, scores, metrics = jax.device_get(of(state, batch))
        known = {name: float(metric.value) for name, metric in metrics.items() if np.ndim(metric.value) == 0}
        return Measured(flat(grads), known), scores

    return measure


def flat(tree: Any) -> np.ndarray:
    """All numbers of a tree in one vector, float64."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def kinds_of(params: Any) -> np.ndarray:
    """[N] for every number of the tree, in the order of `flat`, the position in KINDS of what it belongs to."""
    parts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        parts.append(np.full(np.size(leaf), KINDS.index(kind_of([str(entry.key) for entry in path])), np.int8))
    return np.concatenate(parts)


def kind_of(names: list[str]) -> str:
    """The kind of a parameter by the names on its path."""
    if any("norm" in name for name in names):
        return "norms"
    if "attention" in names:
        return "attention"
    if "moe" in names:
        return "experts" if names[-1] in ("gate", "up", "down") else "routers"
    return "embeddings" if names[-1] in ("embedding", "head") else "dense"


# ---------------------------------------------------------------------------- numbers


def cosine(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """⟨a, b⟩ / |a||b|; NaN where one of them is 0."""
    norms = float(np.linalg.norm(a_N) * np.linalg.norm(b_N))
    return float(a_N @ b_N) / norms if norms else float("nan")


def shares(gradient_N: np.ndarray, kinds_N: np.ndarray) -> dict[str, float]:
    """Share of the squared norm by kind; NaN of a gradient that is 0."""
    squared = np.bincount(kinds_N, gradient_N**2, minlength=len(KINDS))
    whole = squared.sum()
    return {kind: float(part / whole) if whole else float("nan") for kind, part in zip(KINDS, squared, strict=True)}


def ess(log_w_N: np.ndarray) -> float:
    """(Σ w)² / (n Σ w²), in (0, 1]: what share of the tokens an importance-weighted mean effectively uses."""
    w_N = np.exp(np.asarray(log_w_N, np.float64) - np.max(log_w_N))
    return float(w_N.sum() ** 2 / (len(w_N) * (w_N**2).sum()))


def split_variance(log_w_N: np.ndarray, changed_N: np.ndarray) -> dict[str, float]:
    """The variance of log w over tokens, by whether one of a token's experts has changed.

    token_var      Var log w
    changed_tokens share of tokens with a change
    changed_share  Σ_changed (x − mean)² / Σ (x − mean)²: what these tokens carry of it
    between_share  Σ_g n_g (mean_g − mean)² / Σ (x − mean)²: what the two groups' means differ by
    within_changed, within_same
                   Σ_g (x − mean_g)² / Σ (x − mean)², so that between and within add up to 1
    Shares are NaN where nothing varies.
    """
    x_N, changed_N = np.asarray(log_w_N, np.float64), np.asarray(changed_N, bool)
    squared_N = (x_N - x_N.mean()) ** 2
    whole = squared_N.sum()
    groups = [x_N[changed_N], x_N[~changed_N]]
    within = [float(((g - g.mean()) ** 2).sum()) if len(g) else 0.0 for g in groups]
    between = sum(len(g) * (g.mean() - x_N.mean()) ** 2 for g in groups if len(g))
    share = lambda part: float(part / whole) if whole else float("nan")  # noqa: E731
    return {
        "token_var": float(whole / len(x_N)),
        "changed_tokens": float(changed_N.mean()),
        "changed_share": share(squared_N[changed_N].sum()),
        "between_share": share(between),
        "within_changed": share(within[0]),
        "within_same": share(within[1]),
    }


def routes_changed(old_LBTX: np.ndarray, new_LBTX: np.ndarray, completion_width: int) -> np.ndarray:
    """[B, C] whether any layer chose other experts, as sets, where a token is predicted."""
    differ_BT = (experts_changed(old_LBTX, new_LBTX) > 0).any(axis=0)
    T = differ_BT.shape[1]
    return differ_BT[:, T - completion_width - 1 : T - 1]
