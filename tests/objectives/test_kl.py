"""KL estimators, entropy, and corrections for a sampler that differs from the learner."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.objectives.aggregations import AGGREGATIONS
from gspo.objectives.kl import KL_LOSSES, KL_WEIGHTS
from gspo.types import LossInputs
from tests import oracles
from tests.loss_arrays import arrays, jit, loss_and_gradient, metrics_of, objective_of

POLICY_LOGITS = np.array([0.3, -1.0, 0.8, 0.1, -0.4])
OTHER_LOGITS = np.array([-0.5, 0.4, 0.2, 0.9, -0.2])
REF_LOGITS = np.array([0.1, 0.6, -0.3, 0.0, 0.5])


@functools.partial(jit, static_argnums=(2, 3))
@functools.partial(jax.value_and_grad)
def expected_penalty(logits, sampled_from, estimator, weight):
    """E over the five tokens, drawn from `sampled_from`, of weight · estimator: every token once, weighted by its
    probability."""
    logp, old, ref = (jax.nn.log_softmax(z)[None] for z in (logits, sampled_from, REF_LOGITS))
    mask = np.ones((1, 5), bool)
    k = KL_WEIGHTS[weight](logp, old, mask) * KL_LOSSES[estimator](logp, ref)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(old)) * k)


def kl(p_logits, q_logits):
    p, q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(p) * (p - q))


# Catches k1 taken for a loss that pulls to the reference, and any claim of the table in gspo/objectives/kl.py that is
# not so.
@pytest.mark.parametrize(
    "estimator, weight, on_policy, value_exact, gradient_of",
    [
        ("k1", "none", True, True, "nothing"), ("k2", "none", True, False, "reverse"),
        ("k3", "none", True, True, "forward"),
        ("k1", "stopped", False, True, "nothing"), ("k2", "stopped", False, False, "reverse"),
        ("k3", "stopped", False, True, "forward"),
        ("k1", "differentiable", False, True, "reverse"), ("k2", "differentiable", False, False, "neither"),
        ("k3", "differentiable", False, True, "reverse"),
        ("k2", "none", False, False, "neither"), ("k3", "none", False, False, "neither"),
    ],
)  # fmt: skip
def test_kl_estimators_have_the_bias_that_their_table_says(estimator, weight, on_policy, value_exact, gradient_of):
    with jax.enable_x64(True):
        old = POLICY_LOGITS if on_policy else OTHER_LOGITS
        value, gradient = expected_penalty(POLICY_LOGITS, old, estimator, weight)
        reverse = jax.grad(kl)(POLICY_LOGITS, REF_LOGITS)
        forward = jax.grad(lambda z: kl(REF_LOGITS, z))(POLICY_LOGITS)
        exact = kl(POLICY_LOGITS, REF_LOGITS)
    assert np.isclose(value, exact, rtol=1e-9) == value_exact
    candidates = {"nothing": np.zeros(5), "reverse": reverse, "forward": forward}
    holds = {name for name, candidate in candidates.items() if np.allclose(gradient, candidate, atol=1e-9)}
    assert holds == ({gradient_of} if gradient_of != "neither" else set())


# Catches a coefficient on the wrong term, a sign, or a penalty that is aggregated in another way than the loss.
@pytest.mark.parametrize("mode", list(AGGREGATIONS)[:2])
def test_kl_and_entropy_enter_the_loss_with_their_coefficients(mode):
    logp, old, advantages, mask = arrays()
    rng = np.random.default_rng(1)
    ref, entropy = (rng.normal(size=logp.shape).astype(np.float32) for _ in range(2))
    plain, _ = loss_and_gradient(objective_of("grpo", loss_agg_mode=mode), logp, old, advantages, mask, {})
    objective = objective_of("grpo", loss_agg_mode=mode, beta=0.3, kl_loss_type="k2", entropy_coef=0.05)
    assert objective.needs == ("ref_logp_BC", "entropy_BC")
    extras = {"ref_logp_BC": ref, "entropy_BC": entropy}
    loss, _ = loss_and_gradient(objective, logp, old, advantages, mask, extras)
    metrics = metrics_of(objective, logp, old, advantages, mask, **extras)
    extra = AGGREGATIONS[mode](0.3 * (ref - logp) ** 2 / 2 - 0.05 * entropy, mask)
    np.testing.assert_allclose(loss, plain + extra.value, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], entropy[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/policy"], plain, rtol=1e-5)
    with pytest.raises(ValueError, match="ref_logp_BC, entropy_BC"):
        objective(LossInputs(logp, old, advantages, mask))


# Catches π_θ in the place of π_old in ρ, a band on the wrong level, and gradients through a weight.
@pytest.mark.parametrize("method", ["tis", "mis", "icepop", "seq_tis", "seq_mis", "geo_rs"])
def test_corrections_for_the_sampler_weigh_as_their_authors_say(method):
    logp, old, advantages, mask = arrays(rows=12, width=5)
    rng = np.random.default_rng(2)
    spread = np.array([0, 1e-4, 1e-3, 0.1, 0.5, 1.5] * 2)[:, None]
    sampler = (old + spread * rng.normal(size=old.shape)).astype(np.float32)
    objective = objective_of("reinforce", sampler_is=method, loss_agg_mode="token-mean")
    weights = oracles.sampler_weights(method, np.float64(old), np.float64(sampler), mask)
    loss, gradient = loss_and_gradient(objective, logp, old, advantages, mask, {"sampler_logp_BC": sampler})
    np.testing.assert_allclose(gradient, -weights * advantages * mask / mask.sum(), rtol=2e-5, atol=1e-8)
    np.testing.assert_allclose(loss, -(weights * advantages * logp)[mask].sum() / mask.sum(), rtol=1e-4)
    if method not in ("tis", "seq_mis"):
        return
    metrics = metrics_of(objective, logp, old, advantages, mask, sampler_logp_BC=sampler)
    np.testing.assert_allclose(metrics["sampler/weight_mean"], weights[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sampler/kept"], (weights != 0)[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sampler/k1"], (sampler - old)[mask].mean(), rtol=1e-4, atol=1e-7)


# Catches an off-policy mask that drops successes, or measures drift in the wrong direction; dropped rows stay in the
# count.
def test_the_off_policy_mask_drops_failures_that_the_policy_has_left_behind():
    old, mask = np.full((4, 3), -1.0, np.float32), np.ones((4, 3), bool)
    logp = old + np.array([[-0.1], [-0.1], [0.1], [-1e-5]], np.float32)
    advantages = np.array([[-1.0], [1.0], [-1.0], [-1.0]], np.float32) * np.ones((4, 3), np.float32)
    objective = objective_of("reinforce", off_policy_mask_threshold=1e-4, loss_agg_mode="seq-mean-token-mean")
    _, gradient = loss_and_gradient(objective, logp, old, advantages, mask, {})
    np.testing.assert_allclose(gradient, -np.array([[0.0], [1.0], [-1.0], [-1.0]]) / 12 * np.ones((4, 3)), rtol=1e-6)
