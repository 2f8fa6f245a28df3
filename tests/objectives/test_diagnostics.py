"""Metrics of an objective: what they count, and that they add up."""

import functools

import jax
import numpy as np
import pytest

from gspo import masked
from gspo.objectives import diagnostics
from gspo.types import LossInputs
from tests.loss_arrays import arrays, jit, metrics_of, objective_of


# Catches shares that count padding, that count a clip on the harmless side, and sequences where tokens are meant.
def test_clip_shares_say_what_they_count():
    log_w = np.log(np.array([[1.5, 0.5, 1.0, 1.5], [1.5, 0.5, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0], [1.5, 1.5, 1.5, 1.5]]))
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    advantages = np.array([[1.0], [-1.0], [1.0], [1.0]]) * np.ones((4, 4))
    old = np.full((4, 4), -2.0)
    token = metrics_of(objective_of("grpo"), old + log_w, old, advantages, mask)
    expected = {"tokens_low": 2 / 8, "tokens_high": 1 / 8, "tokens": 3 / 8}
    expected |= {"sequences_low": 1 / 3, "sequences_high": 1 / 3, "sequences": 2 / 3}
    expected |= {"low_mean": 2 / 8, "high_mean": 1 / 8, "region_mean": 3 / 8}
    for name, share in expected.items():
        np.testing.assert_allclose(token[f"clip_ratio/{name}"], share, rtol=1e-6, err_msg=name)
    # Row 0 has s = 0.75^(1/3) < 1 and Â > 0: free. Row 1 has s = 0.375^(1/4) < 1 and Â < 0: all four tokens are clipped
    # low.
    sequence = metrics_of(objective_of("gspo"), old + log_w, old, advantages, mask)
    expected = {"tokens_low": 4 / 8, "tokens_high": 0, "tokens": 4 / 8, "sequences_low": 1 / 3, "sequences_high": 0}
    expected |= {"low_mean": 1 / 3, "high_mean": 0, "region_mean": 1 / 3}
    for name, share in expected.items():
        np.testing.assert_allclose(sequence[f"clip_ratio/{name}"], share, rtol=1e-6, err_msg=name)


# Catches padding that makes a sequence count as clipped.
def test_clips_under_the_mask_are_not_counted():
    cut, mask = np.ones((2, 3), bool), np.array([[True, False, False], [False] * 3])
    shares = diagnostics.clip_shares(cut & ~mask, cut, mask, per_sequence=False)
    assert shares["clip_ratio/sequences_low"].value == shares["clip_ratio/tokens_low"].value == 0
    assert shares["clip_ratio/sequences_high"].value == shares["clip_ratio/tokens_high"].value == 1


# Catches ratios of padding in the extremes, the variance of the wrong unit, a weighted mean of sequences by length.
def test_ratio_metrics_equal_a_brute_force_count():
    logp, old, advantages, mask = arrays(rows=40, width=30)
    token = (logp - old)[mask].astype(np.float64)
    sequence = np.array([(logp - old)[i][mask[i]].mean() for i in range(40) if mask[i].any()], np.float64)
    for name, log_w in (("grpo", token), ("gspo", sequence)):
        metrics = metrics_of(objective_of(name), logp, old, advantages, mask)
        w = np.exp(log_w)
        expected = {
            "ratio/min": w.min(), "ratio/mean": w.mean(), "ratio/max": w.max(), "ratio/p99": np.quantile(w, 0.99),
            "ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
            "log_ratio/abs_max": np.abs(token).max(), "log_ratio/token_var": token.var(),
            "log_ratio/abs_p999": np.quantile(np.abs(token), 0.999, method="lower"),
            "log_ratio/sequence_var": sequence.var(),
            "approx_kl/k1": -token.mean(), "approx_kl/k3": (np.exp(token) - 1 - token).mean(),
            "advantage/mean": advantages[mask].mean(), "advantage/std": advantages[mask].std(),
            "advantage/abs_max": np.abs(advantages[mask]).max(),
        }  # fmt: skip
        for key, value in expected.items():
            np.testing.assert_allclose(metrics[key], value, rtol=1e-3, err_msg=key)


# Catches a mean of means, and an extreme that is averaged or takes the 0 of an empty part: the parts hold 13 tokens in
# 3 rows, 7 in 3, 1 in 1 and none at all.
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_metrics_of_unequal_minibatches_add_up_to_those_of_the_whole(name):
    logp, old, advantages, _ = arrays(rows=8, width=6)
    mask = np.arange(6) < np.array([6, 6, 1, 3, 2, 2, 1, 0])[:, None]
    extras = {"sampler_logp_BC": old + 0.1 * np.random.default_rng(3).normal(size=old.shape), "entropy_BC": -old}
    whole = LossInputs(logp, old, advantages, mask, **extras)
    objective, parts = objective_of(name), []
    for rows in (slice(0, 3), slice(3, 6), slice(6, 7), slice(7, 8)):
        parts.append(objective(jax.tree.map(lambda x, rows=rows: x[rows], whole))[1])
    found, expected = masked.values(masked.added(parts)), masked.values(objective(whole)[1])
    of_an_update = {
        "log_ratio/abs_p999",
        "ratio/p99",
        "ess",
        "log_ratio/token_var",
        "log_ratio/sequence_var",
        "advantage/std",
    }
    means_of_means = {key: np.mean([part[key].value for part in parts]) for key in expected}
    assert found.keys() == expected.keys() and len(found) > 25
    for key in found.keys() - of_an_update:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5, atol=1e-6, err_msg=key)
    for key in of_an_update:  # declared as means over updates, here over the three that have a token
        np.testing.assert_allclose(found[key], np.mean([part[key].value for part in parts[:3]]), rtol=1e-5)
    for key in ("clip_ratio/tokens", "entropy", "ratio/min", "ratio/mean", "sampler/k1"):
        assert abs(means_of_means[key] - expected[key]) > 1e-3, key  # what this test looks for can be seen


# Catches metrics that reach into the gradient, or that cost a trace of their own for each batch.
def test_metrics_carry_no_gradient_and_a_step_is_traced_once():
    traces = []

    @functools.partial(jit, static_argnums=0)
    def step(objective, *batch):
        traces.append(1)

        def total(logp):
            return sum(metric.value for metric in objective(LossInputs(logp, *batch[1:]))[1].values())

        return jax.grad(total)(batch[0])

    for seed in range(3):
        assert not np.any(step(objective_of("gspo"), *arrays(seed=seed)))
    assert len(traces) == 1
