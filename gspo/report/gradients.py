"""The gradients that several objectives give one minibatch, by the learner's own code, and how they compare."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gspo.learning.learner import Update, gradient_of, inputs_of
from gspo.learning.scores import Scores
from gspo.masked import Mean, Metrics
from gspo.objectives import Objective
from gspo.types import Batch, LossInputs, TrainState

KINDS = ("routers", "experts", "attention", "embeddings", "norms", "dense")  # of parameters
KEPT = ("clip_ratio/tokens", "clip_ratio/sequences", "ess")  # metrics of an objective


class Measured(NamedTuple):
    """What an objective makes of a minibatch: its gradient [N] float64, in the order of the leaves, and its metrics."""

    gradient_N: np.ndarray
    metrics: dict[str, float]


Measure = Callable[[TrainState, Batch], tuple[list[Measured], Scores]]  # one for each objective; scores on the host


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """The `Loss` that a number picks among objectives, under jit: model, scores and gradient are compiled once for all
    of them. Of their metrics, those in KEPT."""

    objectives: tuple[Objective, ...]
    which: chex.Array  # int32

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(need for objective in self.objectives for need in objective.needs))

    def aggregate(self, x_BC: chex.Array, mask_BC: chex.Array) -> Mean:
        return jax.lax.switch(self.which, [each.aggregate for each in self.objectives], x_BC, mask_BC)

    def __call__(self, inputs: LossInputs) -> tuple[Mean, Metrics]:
        def call(objective: Objective, inputs: LossInputs) -> tuple[Mean, Metrics]:
            loss, metrics = objective(inputs)
            return loss, {name: metrics[name] for name in KEPT}

        return jax.lax.switch(self.which, [partial(call, each) for each in self.objectives], inputs)


def make_measure(update: Update, objectives: Sequence[Objective]) -> Measure:
    """Returns measure(state, batch): the gradients of `update` with each of these in place of its objective, before any
    limit on their norm. State is kept."""

    @jax.jit
    def of(state: TrainState, batch: Batch, which: chex.Array) -> tuple[Any, Scores, Metrics]:
        chosen = dataclasses.replace(update, objective=OneOf(tuple(objectives), which))
        grads, scores = gradient_of(chosen, state, batch)
        return grads, scores, chosen.objective(inputs_of(scores, batch))[1]

    def measure(state: TrainState, batch: Batch) -> tuple[list[Measured], Scores]:
        found = []
        for which in range(len(objectives)):
            grads, scores, metrics = of(state, batch, jnp.int32(which))
            grads, metrics = jax.device_get((grads, metrics))
            found.append(Measured(flat(grads), {name: float(metric.value) for name, metric in metrics.items()}))
        return found, jax.device_get(scores)  # the same for all

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


def cosines(gradients_KN: np.ndarray) -> np.ndarray:
    """[K, K] ⟨a, b⟩ / |a||b| of K gradients; NaN where one of them is 0."""
    products = gradients_KN @ gradients_KN.T
    norms = np.sqrt(np.diag(products))
    return products / np.where(np.outer(norms, norms) > 0, np.outer(norms, norms), np.nan)


def shares(gradient_N: np.ndarray, kinds_N: np.ndarray) -> dict[str, float]:
    """Share of the squared norm by kind; NaN of a gradient that is 0."""
    squared = np.bincount(kinds_N, gradient_N**2, minlength=len(KINDS))
    whole = squared.sum()
    return {kind: float(part / whole) if whole else float("nan") for kind, part in zip(KINDS, squared, strict=True)}
