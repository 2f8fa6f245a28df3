"""What is the same by the papers' own account, and what stays finite at the extremes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo import objectives
from gspo.objectives import ratios
from gspo.types import LossInputs
from tests.loss_arrays import (
    VARIANTS,
    WITHOUT_RATIO,
    arrays,
    few,
    loss_and_gradient,
    metrics_of,
    objective_of,
    router_arrays,
)


# Catches a GSPO-token that clips or weighs tokens by themselves.
@pytest.mark.parametrize("spread", [1e-4, 3e-4, 0.3])
def test_gspo_token_is_gspo_where_advantages_are_constant_along_a_row(spread):
    with jax.enable_x64(True):
        *batch, mask = arrays(rows=12, width=9, spread=spread)
        batch = [np.float64(a) for a in batch]
        one, two = (loss_and_gradient(objective_of(name), *batch, mask, {}) for name in ("gspo", "gspo_token"))
        clipped_one, clipped_two = (metrics_of(objective_of(name), *batch, mask) for name in ("gspo", "gspo_token"))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-12)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-9, atol=1e-15)
    for name in ("tokens_low", "tokens_high", "sequences_low", "sequences_high"):
        assert clipped_one[f"clip_ratio/{name}"] == clipped_two[f"clip_ratio/{name}"]


# Catches a surrogate whose slope at ratio 1 is not 1: a wrong 4/τ, an extra 1/|y|, a ratio that is detached altogether.
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in WITHOUT_RATIO])
def test_at_ratio_one_every_objective_has_the_gradient_of_reinforce(name):
    _, old, advantages, mask = arrays()
    router = router_arrays(*mask.shape) if name == "rspo" else {}
    if router:
        router["router_logp_LBCX"] = router["old_router_logp_LBCX"]
    _, gradient = loss_and_gradient(objective_of(name), old, old, advantages, mask, router)
    mode = objectives.settings(VARIANTS[name]["preset"])["loss_agg_mode"]
    if (
        name == "sequence_sum"
    ):  # d S / d log π_t is S, and not S/|y|: tokens are summed whatever the mean over identical values
        mode = "seq-mean-token-sum"
    _, expected = loss_and_gradient(objective_of("reinforce", loss_agg_mode=mode), old, old, advantages, mask, {})
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


# Catches GRPO and GSPO differing in anything else than the ratio: with one update per rollout all ratios are 1.
def test_with_one_update_per_rollout_grpo_and_gspo_are_the_same_algorithm():
    _, old, advantages, mask = arrays()
    grpo, gspo, token = (
        loss_and_gradient(objective_of(name), old, old, advantages, mask, {}) for name in ("grpo", "gspo", "gspo_token")
    )
    np.testing.assert_allclose(grpo[0], gspo[0], rtol=1e-6)
    np.testing.assert_allclose(grpo[1], gspo[1], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(grpo[1], token[1], rtol=1e-6, atol=1e-9)
    means = [advantages[i][mask[i]].mean() for i in range(4) if mask[i].any()]
    np.testing.assert_allclose(grpo[0], -np.mean(means), rtol=1e-5)


# Catches a SAPO whose gate is not the identity to second order at 1: f(w) = f(1) + (w − 1) + O((w − 1)³).
def test_sapo_is_the_unclipped_ratio_near_one():
    with jax.enable_x64(True):
        old, mask = np.full((1, 3), -1.0), np.ones((1, 3), bool)
        for advantage, step in itertools.product((-1.0, 1.0), (-1e-3, 1e-3)):
            advantages = np.full((1, 3), advantage)
            at_one, _ = loss_and_gradient(objective_of("sapo"), old, old, advantages, mask, {})
            near, gradient = loss_and_gradient(objective_of("sapo"), old + math.log1p(step), old, advantages, mask, {})
            np.testing.assert_allclose(near - at_one, -advantage * step, rtol=1e-6)
            np.testing.assert_allclose(gradient, np.full((1, 3), -advantage * (1 + step) / 3), rtol=1e-6)


# Catches a GMPO whose mean is arithmetic, or taken after the exponential.
def test_gmpo_is_gspo_where_nothing_clips():
    *batch, mask = arrays(spread=0.05)
    mask = np.ones_like(mask)
    gmpo = loss_and_gradient(objective_of("gmpo"), *batch, mask, {})
    gspo = loss_and_gradient(objective_of("gspo", epsilon=0.5, epsilon_high=0.5), *batch, mask, {})
    np.testing.assert_allclose(gmpo[0], gspo[0], rtol=1e-6)
    np.testing.assert_allclose(gmpo[1], gspo[1], rtol=1e-5, atol=1e-8)


# Catches a length weight that enters twice or not at all.
def test_luspo_is_gspo_weighted_by_length():
    *batch, mask = arrays(rows=1, width=6)
    fields = {"epsilon": 2e-3, "epsilon_high": 2.5e-3}
    luspo = loss_and_gradient(objective_of("luspo"), *batch, mask, {})
    gspo = loss_and_gradient(objective_of("gspo", **fields), *batch, mask, {})
    np.testing.assert_allclose(luspo[0], 6 * gspo[0], rtol=1e-6)
    np.testing.assert_allclose(luspo[1], 6 * gspo[1], rtol=1e-5, atol=1e-8)


# Catches CISPO letting the gradient through the ratio, which would double it at w = 1 and keep it for tokens without
# advantage.
def test_the_gradient_of_cispo_flows_through_the_log_probability_only():
    logp, old, advantages, mask = arrays(spread=2.0)
    _, gradient = loss_and_gradient(objective_of("cispo"), logp, old, advantages, mask, {})
    expected = -np.minimum(np.exp(logp - old), 5.0) * advantages * mask / mask.sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


# Catches a router shift that is differentiated, has no floor, or moves ratios although no router moved.
def test_the_router_shift_scales_ratios_down_to_its_floor_and_has_no_gradient():
    mask = np.ones((1, 3), bool)
    old = np.log(np.full((2, 1, 3, 2), 0.5))
    moved = old + np.array([0.0, 0.1, 5.0])[None, None, :, None]

    def shift(router):
        inputs = LossInputs(None, None, None, mask, router_logp_LBCX=router, old_router_logp_LBCX=old)
        return ratios.router_shift(inputs, floor=0.8)

    np.testing.assert_allclose(np.exp(shift(moved))[0], [1, math.exp(-0.1), 0.8], rtol=1e-6)
    gradient = jax.grad(lambda router: shift(router).sum())(moved)
    assert not np.any(gradient)


# Catches exp(log-ratio) overflowing, inf − inf and 0 · inf, in losses, gradients and metrics: the sum of log-ratios of
# one of these sequences is 2.6 million.
@pytest.mark.parametrize("dtype", few([jnp.float32, jnp.bfloat16], jnp.float32))
@pytest.mark.parametrize("name", few(VARIANTS, "grpo", "gspo_token", "sequence_sum", "gmpo"))
def test_nothing_overflows_at_log_ratios_of_80_over_32768_tokens(name, dtype):
    width = 32_768
    sign = np.stack([np.ones(width), -np.ones(width), np.tile([1, -1], width // 2), np.ones(width), -np.ones(width)])
    old = np.where(sign > 0, -80.5, -0.5)
    logp = old + 80 * sign
    advantages = np.array([[1.0], [-1.0], [1.0], [-1.0], [1.0]]) * np.ones((1, width))
    logp, old, advantages = (jnp.asarray(a, dtype) for a in (logp, old, advantages))
    router = {}
    if name == "rspo":
        router = {key: jnp.asarray(s * np.ones((1, 5, width, 1)), dtype) for key, s in
                  (("router_logp_LBCX", -80.0), ("old_router_logp_LBCX", 0.0))}  # fmt: skip
    extras = {"ref_logp_BC": old, "sampler_logp_BC": logp, "entropy_BC": advantages} | router
    objective = objective_of(
        name,
        beta=0.1,
        kl_importance="differentiable",
        entropy_coef=0.1,
        sampler_is="tis",
        off_policy_mask_threshold=1e-4,
    )
    mask = np.ones((5, width), bool)
    loss, gradient = loss_and_gradient(objective, logp, old, advantages, mask, extras)
    assert loss.dtype == jnp.float32 and gradient.dtype == dtype
    assert np.isfinite(loss) and np.all(np.isfinite(np.float32(gradient)))
    if dtype == jnp.float32:
        metrics = metrics_of(objective, logp, old, advantages, mask, **extras)
        assert all(np.isfinite(value) for value in metrics.values()), metrics


# Catches a bound on the log-ratio that changes a result which the clip decides.
@pytest.mark.parametrize("name", ["grpo", "gspo", "sequence_sum", "dual_clip", "cispo", "gmpo", "minirl"])
def test_past_every_clip_a_larger_ratio_changes_nothing(name):
    old, mask = np.full((1, 2), -70.0), np.ones((1, 2), bool)
    results = [
        loss_and_gradient(objective_of(name), old + far, old, np.ones((1, 2)), mask, {})[0] for far in (10.0, 60.0)
    ]
    if name in ("cispo", "minirl"):  # linear in log π, whose weight is what is bounded
        results = [float(r) / (70.0 - far) for r, far in zip(results, (10.0, 60.0), strict=True)]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
