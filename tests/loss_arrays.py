"""Objectives by name, jitted with as little work for the compiler as there can be, and random arrays for them."""

import functools

import jax
import numpy as np
import pytest

from gspo import objectives
from gspo.types import LossInputs

VARIANTS = {name: {"preset": name} for name in objectives.OBJECTIVES} | {
    "sequence_sum": {"preset": "gspo", "importance_sampling_level": "sequence_sum"},
    "dual_clip": {"preset": "grpo", "delta": 3.0},
}
WITHOUT_RATIO = ("reinforce",)


def few(names, *quick):
    """All names as parameters; those not named after them only with -m slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


# Compiled for a quick start: the arrays are tiny, the programs are many.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def objective_of(name, **overrides):
    """One object for the same settings, so that jit does not trace it again."""
    fields = VARIANTS[name] | overrides
    return objectives.make_objective(**objectives.settings(fields.pop("preset"), **fields))


@functools.partial(jit, static_argnums=0)
def loss_and_gradient(objective, logp_BC, old_logp_BC, advantages_BC, mask_BC, extras):
    def loss(logp_BC):
        return objective(LossInputs(logp_BC, old_logp_BC, advantages_BC, mask_BC, **extras))[0].value

    return jax.value_and_grad(loss)(logp_BC)


@functools.partial(jit, static_argnums=0)
def metrics_of(objective, *arrays, **extras):
    return {name: metric.value for name, metric in objective(LossInputs(*arrays, **extras))[1].items()}


def arrays(rows=4, width=6, seed=0, spread=0.3, constant_advantages=True):
    """logp, old_logp, advantages, mask: a full row, a row of one token, an empty row, and rows of any length."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[width, 1, 0], rng.integers(1, width + 1, max(rows - 3, 0))])[:rows]
    mask = np.arange(width)[None] < lengths[:, None]
    old = -np.abs(rng.normal(size=(rows, width))) - 0.5
    advantages = rng.normal(size=(rows, 1 if constant_advantages else width))
    logp = old + spread * rng.normal(size=(rows, width))
    return [a.astype(np.float32) for a in (logp, old, advantages * np.ones((rows, width)))] + [mask]


def router_arrays(rows, width, seed=0):
    """Router log-probs [L, B, C, X], now and then: some tokens moved past the floor of RSPO, some hardly."""
    rng = np.random.default_rng(seed)
    old = -np.abs(rng.normal(size=(2, rows, width, 3)))
    return {"router_logp_LBCX": old + 0.2 * rng.normal(size=old.shape), "old_router_logp_LBCX": old}
