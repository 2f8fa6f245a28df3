"""The bounds on sampler against learner."""

import jax.numpy as jnp
import numpy as np
import pytest

from gspo.learning.agreement import complaint, gap_between


def gap(difference, mask=None):
    difference = np.atleast_2d(np.asarray(difference, np.float32))
    mask = np.ones(difference.shape, bool) if mask is None else mask
    logp = -np.random.default_rng(0).exponential(size=difference.shape).astype(np.float32)
    return gap_between(jnp.asarray(logp), jnp.asarray(logp + difference), jnp.asarray(mask))


def test_one_token_in_a_thousand_may_differ_and_not_two():
    # Catches a bound on the maximum, which a router tie that rounding decides breaks in an honest run, and a share that
    # lets a row of wrong log-probs pass.
    difference = np.zeros((20, 100))
    difference[3, 4] = difference[7, 7] = 0.3  # two of 2,000
    assert complaint(gap(difference), "float32", None) is None
    difference[9, 0] = 0.3
    assert "more than one token in a thousand" in complaint(gap(difference), "float32", None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_sees_what_hides_below_the_bound_on_tokens(dtype):
    # Catches a check in bfloat16 that weights one rollout old pass: each token moves by less than rounding may.
    rng = np.random.default_rng(1)
    stale, rounding = (rng.normal(size=(32, 50)) * scale for scale in (0.08, 0.01 if dtype == "bfloat16" else 1e-6))
    assert np.abs(stale).max() < 0.5 and np.abs(rounding).max() < 0.5
    assert complaint(gap(rounding), dtype, None) is None
    assert "differ by" in complaint(gap(stale), dtype, None)
    if dtype == "bfloat16":
        assert "KL of" in complaint(gap(stale), dtype, None) and complaint(gap(stale), dtype, 5.0) is None


def test_padding_says_nothing_and_nan_is_no_agreement():
    # Catches junk past the end of a completion taken for a difference, and NaN that compares as small.
    mask = np.arange(10) < np.array([[4], [10]])
    difference = np.where(mask, 0.0, 9.0)
    assert complaint(gap(difference, mask), "float32", 0.0) is None
    assert complaint(gap(difference, np.zeros((2, 10), bool)), "float32", 0.0) is None
    assert complaint(gap(np.full((2, 10), np.nan)), "float32", None) is not None
