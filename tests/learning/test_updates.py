"""Several updates: what moves from one to the next, and what they pull towards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.learning.learner import UpdatePlan, make_ref_sync, make_train_step
from gspo.objectives import preset
from tests import model_oracle as oracle
from tests.few_rows import (
    DENSE,
    GSPO_MOE,
    MOE,
    OPTIMIZER,
    SFT_DENSE,
    TRACES,
    fresh_state,
    make_batch,
    rows_of,
    scorer_of,
    step_of,
)


def test_the_ratio_is_one_before_the_first_update_and_moves_after_it():
    # Catches stale or missing old log-probs: a ratio that is off at once, or one that is 1 for ever and clips nothing.
    batch, state = make_batch(), fresh_state(MOE)
    scores = scorer_of(0)(state.params, batch.tokens_BT, batch.prompt_lengths_B)
    batch = batch.replace(inputs=batch.inputs.replace(old_logp_BC=scores.logp_BC))
    step = step_of(*GSPO_MOE)
    gaps, clipped = [], []
    for _ in range(3):
        state, metrics = step(state, batch)
        gaps.append(float(metrics["log_ratio/abs_max"].value))
        clipped.append(float(metrics["clip_ratio/sequences"].value))
    assert gaps[0] < 2e-5 and clipped[0] == 0
    assert min(gaps[1:]) > 1e-2 and max(clipped[1:]) > 0
    assert int(state.step) == 3


def test_the_given_state_is_donated_and_later_calls_do_not_trace_again():
    # Catches two copies of parameters and optimizer in memory, and a compilation for every update.
    state, step = fresh_state(MOE), step_of(*GSPO_MOE)
    new_state, _ = step(state, make_batch())
    before = TRACES["gspo"]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    for order in ([1, 0, 2, 3], [3, 2, 1, 0]):
        new_state, _ = step(new_state, make_batch(order=order))
    assert TRACES["gspo"] == before > 0


def test_supervised_updates_raise_the_likelihood_of_the_demonstrations():
    # Catches the wrong sign, and a loss over the prompt or the padding, which these few rows would not improve so far.
    step, batch, state = step_of(*SFT_DENSE), make_batch(), fresh_state(DENSE)
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].value))
    exact = oracle.float64(oracle.build(DENSE)[1])
    logps = np.concatenate([oracle.score(exact, DENSE, *row, temperature=0.8)[0] for row in rows_of()])
    assert losses[0] == pytest.approx(-logps.mean(), rel=1e-5)
    assert losses[-1] < 0.3 * losses[0]


def test_the_entropy_bonus_adapts_to_its_target_and_pulls_with_its_coefficient():
    # Catches a coefficient that moves the wrong way or below 0, a penalty for a bonus, and one that is weighed by other
    # means than the loss. The coefficient is data: one compiled step serves all of its values.
    model, params = oracle.build(DENSE)
    exact, rows = oracle.float64(params), rows_of()
    target = np.concatenate([oracle.score(exact, DENSE, *row)[1] for row in rows]).mean()
    plan = UpdatePlan(chunk=4, entropy_target=target - 0.05, entropy_step=0.25)
    step = make_train_step(model, OPTIMIZER, preset("grpo"), plan)
    sharp = params | {"embedding": 3 * params["embedding"]}  # the head is tied to it: less entropy than the target
    found = {}
    for start, coef, expected in ((params, 0.0, 0.0), (params, 0.1, 0.0), (params, 0.5, 0.25), (sharp, 0.5, 0.75)):
        state = fresh_state(DENSE).replace(params=jax.tree.map(jnp.copy, start), entropy_coef=jnp.float32(coef))
        state, metrics = step(state, make_batch().replace(old_routes_LBTX=None, replayed_routes_LBTX=None))
        assert metrics["entropy_coef"].value == state.entropy_coef == expected
        found.setdefault(coef, state.opt_state[0])

    def mean_entropy(params):
        return np.mean([oracle.score(params, DENSE, *row)[1].mean() for row in rows])

    checks = oracle.directional_derivatives(mean_entropy, exact, np.random.default_rng(10))
    for (name, direction, expected), with_bonus, without in zip(
        checks, jax.tree.leaves(found[0.5]), jax.tree.leaves(found[0.0]), strict=True
    ):
        pull = np.sum(np.asarray(with_bonus - without, np.float64) * direction) / -0.5
        assert pull == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def test_the_reference_follows_the_policy_by_the_mixup_share():
    # Catches shares that are swapped: a reference that jumps to the policy takes the KL term away.
    mixed = make_ref_sync(0.6)({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([11.0, -8.0])})
    np.testing.assert_allclose(mixed["w"], [5.0, -2.0], rtol=1e-6)
