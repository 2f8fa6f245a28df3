"""Every objective against its paper: values and gradients of float64 loops (tests/oracles.py), and edges."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from gspo import objectives
from gspo.objectives import ratios
from tests import oracles
from tests.loss_arrays import VARIANTS, arrays, loss_and_gradient, metrics_of, objective_of, router_arrays


def edge_rows(rng, kind, width):
    """Log-ratios of one row, of the kinds at which implementations differ. Edges are met to 1e-5 on either side."""
    side = rng.choice([-1e-5, 1e-5])
    signs = rng.choice([-1, 1])
    return {
        "on policy": np.zeros(width),
        "near": 1e-4 * rng.normal(size=width),
        "usual": 0.2 * rng.normal(size=width),
        "far": 1.5 * rng.normal(size=width),
        "token edge": np.log(np.where(signs > 0, rng.choice([1.2, 1.27, 1.28, 5.0]), 0.8) + side + np.zeros(width)),
        "gmpo edge": signs * 0.4 + side + np.zeros(width),
        "sequence edge": math.log1p(4e-4 if signs > 0 else -3e-4) + side + rng.permutation(np.linspace(-1, 1, width)),
        "luspo edge": math.log1p(2.5e-3 if signs > 0 else -2e-3) + side + np.zeros(width),
    }[kind]


@st.composite
def batches(draw, shapes):
    rows, width = draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = ["on policy", "near", "usual", "far", "token edge", "gmpo edge", "sequence edge", "luspo edge"]
    log_ratio = np.stack([edge_rows(rng, draw(st.sampled_from(kinds)), width) for _ in range(rows)])
    lengths = np.array([draw(st.sampled_from([0, 1, width, width, (width + 1) // 2])) for _ in range(rows)])
    mask = np.arange(width)[None] < lengths[:, None]
    if draw(st.booleans()):  # a loss mask may have gaps: tokens that a tool wrote
        mask &= rng.random((rows, width)) < 0.8
    signs = np.array([draw(st.sampled_from([-1.0, 0.0, 1.0])) for _ in range(rows)])
    advantages = np.repeat((signs * (0.2 + rng.random(rows)))[:, None], width, axis=1)
    old = -np.abs(rng.normal(size=(rows, width))) - 0.1
    logp = old + log_ratio
    for a in (logp, old, advantages):  # what lies under the mask must not matter
        a[~mask] = rng.choice([np.nan, np.inf, -np.inf, 3.0])
    return logp, old, advantages, mask


def check_against_oracle(name, batch):
    logp, old, advantages, mask = batch
    router = router_arrays(*mask.shape) if name == "rspo" else {}
    oracle, rest = getattr(oracles, name), (old, advantages, mask, *router.values())
    with jax.enable_x64(True):
        loss, gradient = loss_and_gradient(objective_of(name), logp, old, advantages, mask, router)
    assert loss.dtype == np.float64
    np.testing.assert_allclose(loss, oracle(logp, logp, *rest), rtol=1e-6, atol=1e-12)
    expected = oracles.gradient(oracle, logp, *rest)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 * np.abs(expected).max() + 1e-9)


# Catches any wrong sum: a missing 1/|y|, a minimum that is a clip, an edge on the wrong side, empty rows counted, a
# gradient through a stopped ratio. In float64, so that nothing hides behind rounding.
@pytest.mark.parametrize("name", VARIANTS)
@hypothesis.given(batch=batches(st.just((4, 5))))
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
def test_each_objective_equals_its_paper_in_value_and_gradient(name, batch):
    check_against_oracle(name, batch)


# The same over any small shape, one row of one token among them, and many more examples.
@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@hypothesis.given(batch=batches(st.tuples(st.integers(1, 5), st.integers(1, 7))))
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
def test_each_objective_equals_its_paper_over_many_shapes(name, batch):
    check_against_oracle(name, batch)


# Catches float64 creeping in as the only precision that works: log s_i differs from 0 by 1e-4 and must survive float32.
@pytest.mark.parametrize("name", VARIANTS)
def test_float32_is_enough_for_each_objective(name):
    logp, old, advantages, mask = arrays(spread=3e-4 if name in ("gspo", "gspo_token", "luspo") else 0.3)
    router = router_arrays(*mask.shape) if name == "rspo" else {}
    loss, gradient = loss_and_gradient(objective_of(name), logp, old, advantages, mask, router)
    oracle, rest = getattr(oracles, name), (np.float64(old), np.float64(advantages), mask, *router.values())
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss, oracle(np.float64(logp), np.float64(logp), *rest), rtol=1e-5)
    expected = oracles.gradient(oracle, logp, *rest)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Catches a row advantage used for GSPO-token, whose reason to exist is advantages that differ along a row.
def test_gspo_token_takes_an_advantage_per_token():
    logp, old, advantages, mask = arrays(spread=3e-4, constant_advantages=False)
    with jax.enable_x64(True):
        batch = [np.float64(a) for a in (logp, old, advantages)]
        loss, gradient = loss_and_gradient(objective_of("gspo_token"), *batch, mask, {})
    np.testing.assert_allclose(loss, oracles.gspo_token(batch[0], *batch, mask), rtol=1e-9)
    expected = oracles.gradient(oracles.gspo_token, *batch, mask)
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


# Catches a product where a geometric mean belongs, and the reverse: the example everybody quotes.
def test_hello_world_has_the_ratios_of_the_example():
    old, logp = np.log([[0.20, 0.10]]), np.log([[0.25, 0.30]])
    mask, advantages = np.ones((1, 2), bool), np.ones((1, 2))
    with jax.enable_x64(True):

        def ratio(level):
            return np.exp(ratios.LOG_RATIOS[level](logp, old, mask))

        np.testing.assert_allclose(ratio("token"), [[1.25, 3.0]], rtol=1e-12)
        np.testing.assert_allclose(ratio("sequence_sum"), [[3.75]], rtol=1e-12)
        np.testing.assert_allclose(ratio("sequence"), [[math.sqrt(3.75)]], rtol=1e-12)
        np.testing.assert_allclose(ratio("sequence_token"), [[math.sqrt(3.75)] * 2], rtol=1e-12)
        assert abs(math.sqrt(3.75) - 1.9365) < 1e-4
        for level in ratios.LOG_RATIOS:
            objective = objectives.make_objective(importance_sampling_level=level, epsilon=0.2, epsilon_high=0.2)
            loss, gradient = loss_and_gradient(objective, logp, old, advantages, mask, {})
            np.testing.assert_allclose(loss, -1.2, rtol=1e-12)  # every one of them is clipped to 1.2
            assert not np.any(gradient)


# Catches s clamped to the absolute range [3e-4, 4e-4], an ε applied to log s, and a clip that acts on the wrong sign of
# Â.
@pytest.mark.parametrize(
    "ratio, advantage, weight, slope",
    [
        (1.0, 1, 1.0, 1), (1.0, -1, 1.0, 1),
        (1 + 3.9e-4, 1, 1 + 3.9e-4, 1), (1 + 4.1e-4, 1, 1 + 4e-4, 0), (1 + 4.1e-4, -1, 1 + 4.1e-4, 1),
        (2.0, -1, 2.0, 1),
        (1 - 2.9e-4, -1, 1 - 2.9e-4, 1), (1 - 3.1e-4, -1, 1 - 3e-4, 0), (1 - 3.1e-4, 1, 1 - 3.1e-4, 1),
        (0.5, 1, 0.5, 1),
    ],
)  # fmt: skip
def test_gspo_clips_around_one_and_only_where_the_advantage_pushes(ratio, advantage, weight, slope):
    with jax.enable_x64(True):
        old, mask = np.full((1, 4), -1.0), np.ones((1, 4), bool)
        logp, advantages = old + math.log(ratio), np.full((1, 4), float(advantage))
        loss, gradient = loss_and_gradient(objective_of("gspo"), logp, old, advantages, mask, {})
        metrics = metrics_of(objective_of("gspo"), logp, old, advantages, mask)
    np.testing.assert_allclose(loss, -weight * advantage, rtol=1e-12)
    np.testing.assert_allclose(gradient, np.full((1, 4), -slope * ratio * advantage / 4), rtol=1e-12)
    assert metrics["clip_ratio/tokens_high"] == (slope == 0 and ratio > 1)
    assert metrics["clip_ratio/tokens_low"] == (slope == 0 and ratio < 1)


# Catches the clip range of one side used on both, and the cap of a dual clip that acts on positive advantages.
@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (1.26, 1, 1.26, 1),
        (1.28, 1, 1.27, 0),
        (0.81, -1, -0.81, 1),
        (0.79, -1, -0.8, 0),
        (2.9, -1, -2.9, 1),
        (3.1, -1, -3, 0),
    ],
)
def test_the_dual_clip_has_three_edges(ratio, advantage, value, slope):
    old, mask = np.full((1, 1), -1.0), np.ones((1, 1), bool)
    logp, advantages = old + math.log(ratio), np.full((1, 1), float(advantage))
    loss, gradient = loss_and_gradient(objective_of("dual_clip"), logp, old, advantages, mask, {})
    np.testing.assert_allclose(-loss, value, rtol=1e-6)
    np.testing.assert_allclose(-gradient, [[slope * ratio * advantage]], rtol=1e-6)


# Catches the two being implemented as different methods: the cap of the ratio and the bound of the loss are one thing.
def test_the_two_sided_cap_of_the_ratio_equals_the_dual_clip():
    logp, old, advantages, mask = arrays(rows=16, spread=2.0)
    loss, _ = loss_and_gradient(objective_of("dual_clip", loss_agg_mode="token-mean"), logp, old, advantages, mask, {})
    w = np.exp(logp - old)
    two_sided = np.minimum(np.minimum(w, 3.0) * advantages, np.clip(w, 0.8, 1.27) * advantages)
    np.testing.assert_allclose(loss, -two_sided[mask].mean(), rtol=1e-5)
