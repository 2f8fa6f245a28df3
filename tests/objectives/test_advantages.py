"""Advantages against loops over the groups, conventions that libraries disagree about, generalised advantage
estimation."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from gspo.objectives import advantages
from gspo.types import UserError

GROUPED = ["group", "batch", "none", "rloo", "reinforce++_baseline"]


@st.composite
def rewards_in_groups(draw):
    """Rewards of Q groups of G; among them groups in which all are equal."""
    group = draw(st.sampled_from([2, 4]))
    groups = draw(st.sampled_from([1, 3]))
    kind = st.sampled_from(["binary", "real", "equal"])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parts = {"binary": lambda: rng.integers(0, 2, group) * 1.0, "real": lambda: rng.normal(size=group),
             "equal": lambda: np.full(group, rng.random())}  # fmt: skip
    return np.concatenate([parts[draw(kind)]() for _ in range(groups)]), group


# Catches ddof 0, a missing 1e-6 or 1e-4 in its place, the batch's mean for the group's, and groups that are not
# neighbours.
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@hypothesis.given(case=rewards_in_groups())
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
def test_group_relative_advantages_equal_the_loop(scale, case):
    rewards, group = case
    with jax.enable_x64(True):
        found = advantages.ADVANTAGES[scale](rewards, group)
    np.testing.assert_allclose(found, oracles.group_advantages(rewards, group, scale), rtol=1e-9, atol=1e-9)


# Catches a baseline that contains the reward it is compared with.
@hypothesis.given(case=rewards_in_groups())
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
def test_leave_one_out_equals_the_loop(case):
    rewards, group = case
    with jax.enable_x64(True):
        found = advantages.ADVANTAGES["rloo"](rewards, group)
    np.testing.assert_allclose(found, oracles.leave_one_out(rewards, group), rtol=1e-9, atol=1e-12)


# Catches the difference to other libraries changing unnoticed: with ddof 0 it would be √(G/(G−1)) larger.
def test_the_deviation_is_the_sample_deviation():
    np.testing.assert_allclose(advantages.group_relative(np.array([1.0, 0.0]), 2), [0.5**0.5, -(0.5**0.5)], rtol=1e-5)


# Catches rounding of the mean divided by 1e-6: three times 0.1 does not average to 0.1 exactly.
@pytest.mark.parametrize("name", [*GROUPED, "reinforce++"])
def test_groups_of_equal_rewards_have_exactly_no_advantage(name):
    for reward in (0.1, 0.3, 1 / 3, 1e6 + 0.1):
        assert not np.any(advantages.ADVANTAGES[name](np.full(21, reward, np.float32), 3 if name != "batch" else 7))


# Catches whitening over groups in place of the batch, or before the baseline.
def test_whitening_is_over_the_whole_batch():
    rewards = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5])
    whitened = (rewards - rewards.mean()) / (oracles.deviation(rewards) + 1e-6)
    np.testing.assert_allclose(advantages.ADVANTAGES["reinforce++"](rewards, 4), whitened, rtol=1e-5)
    centred = rewards - np.repeat(rewards.reshape(2, 4).mean(1), 4)
    whitened = centred / (oracles.deviation(centred) + 1e-6)
    np.testing.assert_allclose(advantages.ADVANTAGES["reinforce++_baseline"](rewards, 4), whitened, rtol=1e-5)


# Catches advantages that move when every reward does, and a scale that is not divided out.
def test_advantages_ignore_the_level_of_rewards_and_groups_ignore_their_scale():
    rewards = np.random.default_rng(0).normal(size=12)
    for name in GROUPED:
        f = advantages.ADVANTAGES[name]
        np.testing.assert_allclose(f(rewards + 3, 4), f(rewards, 4), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        advantages.group_relative(10 * rewards, 4), advantages.group_relative(rewards, 4), rtol=1e-4
    )


# Catches a group of one, whose deviation is 0/0, reaching the device as NaN.
@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_one_are_an_error_that_names_the_field(name):
    with pytest.raises(UserError, match="num_generations: 1 completion") as error:
        advantages.ADVANTAGES[name](np.ones(4), 1)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="num_generations: 5 rewards do not divide into groups of 2"):
        advantages.ADVANTAGES[name](np.ones(5), 2)


# Catches weights on the wrong sign.
def test_weights_by_sign_scale_each_side():
    np.testing.assert_allclose(
        advantages.weighted_by_sign(np.array([2.0, 0.0, -2.0]), 0.1, 1.0), [0.2, 0.0, -2.0], rtol=1e-6
    )


# ---------------------------------------------------------------------------- critic


gae = jax.jit(advantages.gae, static_argnames=("gamma", "lam"))


# Catches δ with the wrong next value, a recursion that runs through padding or stops at a gap of the mask, and γ
# without λ.
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    gaps=st.booleans(),
)
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
def test_gae_equals_the_sum_of_its_definition(seed, gamma, lam, gaps):
    rng = np.random.default_rng(seed)
    mask = np.arange(6)[None] < np.array([6, 1, 0, 4])[:, None]
    if gaps:
        mask &= rng.random(mask.shape) < 0.7
    rewards, values = rng.normal(size=mask.shape), rng.normal(size=mask.shape)
    rewards[~mask], values[~mask] = np.nan, np.inf
    with jax.enable_x64(True):
        found, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = oracles.gae(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.asarray(returns)[mask], (expected + values)[mask], rtol=1e-9, atol=1e-12)


# Catches a terminal reward that is discounted by the length of the padding.
def test_with_a_final_reward_and_no_discount_every_token_gets_the_reward_minus_its_value():
    mask = np.array([[True] * 4 + [False] * 3])
    rewards = np.where(np.arange(7) == 3, 1.0, 0.0)[None]
    values = np.full((1, 7), 0.25)
    found, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(found, [[0.75] * 4 + [0] * 3])
    np.testing.assert_allclose(returns, [[1.0] * 4 + [0] * 3])


# Catches a return that is cut at the next token, or discounted, or counts what came before: with γ = λ = 1 and a critic
# that expects nothing, PPO's advantages are the rewards to go of REINFORCE.
def test_without_discount_a_zero_critic_leaves_the_monte_carlo_returns():
    rng = np.random.default_rng(3)
    mask = np.arange(6)[None] < np.array([6, 1, 0, 4])[:, None]
    rewards = rng.normal(size=mask.shape)
    found, returns = gae(rewards, np.zeros(mask.shape), mask, gamma=1.0, lam=1.0)
    for b, t in np.argwhere(mask):
        to_go = sum(rewards[b, s] for s in range(t, 6) if mask[b, s])
        assert found[b, t] == pytest.approx(to_go, rel=1e-5) and returns[b, t] == pytest.approx(to_go, rel=1e-5)
    assert not np.asarray(found)[~mask].any()


# Catches advantages in bf16, or as integers, for inputs of those kinds.
def test_advantages_are_float32_whatever_the_rewards_are():
    for rewards in (np.array([1, 0, 1, 1]), jnp.array([1, 0, 1, 1], jnp.bfloat16), np.array([True, False, True, True])):
        for name, f in advantages.ADVANTAGES.items():
            assert f(rewards, 2).dtype == jnp.float32, name


# Catches a reward on the last column, which is padding for most rows, and a penalty that is added.
def test_the_reward_of_a_completion_falls_on_its_last_token():
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]], bool)
    penalty = np.where(mask, 0.25, np.nan)
    found = advantages.token_rewards(np.array([1.0, 2.0, 3.0, 4.0]), penalty, mask)
    np.testing.assert_allclose(found, [[-0.25, -0.25, 0.75, 0], [1.75, 0, 0, 0], [0, 0, 0, 0], [-0.25, 0, 3.75, 0]])


# Catches a minimum for the maximum: the clip must hold a critic back and never let it off.
@pytest.mark.parametrize(
    "value, loss, slope",
    [
        (0.0, 0.5, -1.0),
        (0.4, 0.5 * 0.8**2, 0.0),
        (1.5, 0.5 * 0.8**2, 0.0),
        (2.5, 0.5 * 1.5**2, 1.5),
        (-0.5, 0.5 * 1.5**2, -1.5),
    ],
)
def test_the_clipped_value_loss_holds_the_critic_near_its_old_values(value, loss, slope):
    def total(v):
        return advantages.clipped_value_loss(v, np.zeros((1, 1)), np.ones((1, 1)), cliprange=0.2).sum()

    found, gradient = jax.value_and_grad(total)(np.full((1, 1), value, np.float32))
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[slope]], rtol=1e-6)
