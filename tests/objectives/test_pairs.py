"""Losses on preferences against the papers' sums, in float64, value and gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.masked import added
from gspo.objectives import DPO, bradley_terry, implicit_rewards
from gspo.types import LossInputs
from tests.loss_arrays import jit

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=8) * 3
MARGINS = np.repeat(RNG.uniform(0, 2, 4), 2)
LENGTHS = np.array([5, 1, 3, 4, 2, 5])
MASK = np.arange(5) < LENGTHS[:, None]
LOGP, REF = -np.abs(RNG.normal(size=(2, 6, 5)))


def log_sigmoid(z):
    return -math.log(1 + math.exp(-z))


def bradley_terry_oracle(scores, margins, coefficient):
    """−1/Q Σ log σ(r_c − r_r − m) + λ/Q Σ (r_c + r_r)²."""
    total, pairs = 0.0, 0
    for q in range(0, len(scores), 2):
        chosen, rejected = scores[q], scores[q + 1]
        total += -log_sigmoid(chosen - rejected - margins[q]) + coefficient * (chosen + rejected) ** 2
        pairs += 1
    return total / pairs


def dpo_oracle(logp, ref, lengths, beta, smoothing):
    """−1/Q Σ (1 − ε) log σ(h) + ε log σ(−h), h = β [log π(y_c)/π_ref(y_c) − log π(y_r)/π_ref(y_r)]."""
    total, pairs = 0.0, 0
    for q in range(0, len(lengths), 2):
        ratios = []
        for i in (q, q + 1):
            ratio = 0.0
            for t in range(lengths[i]):
                ratio += logp[i][t] - ref[i][t]
            ratios.append(ratio)
        h = beta * (ratios[0] - ratios[1])
        total -= (1 - smoothing) * log_sigmoid(h) + smoothing * log_sigmoid(-h)
        pairs += 1
    return total / pairs


def differences(loss, x, step=1e-6):
    """Central differences of a loss in all entries of x."""
    grad = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        grad[index] = (loss(above) - loss(below)) / (2 * step)
    return grad


def dpo_inputs(logp, ref=REF, mask=MASK):
    zeros = jnp.zeros(mask.shape)
    return LossInputs(logp, zeros, zeros, mask, ref_logp_BC=ref)


@pytest.mark.parametrize("margins", [MARGINS, 0 * MARGINS], ids=["margins", "none"])
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_bradley_terry_is_the_sum_of_the_papers_in_value_and_gradient(margins, coefficient):
    # Catches chosen and rejected exchanged, a margin added where it is to be subtracted, a mean over rows, a centring
    # term of the difference, or of each score alone.
    with jax.enable_x64(True):
        loss = lambda s: bradley_terry(s, margins, center_rewards_coefficient=coefficient)[0].value  # noqa: E731
        value, grad = jit(jax.value_and_grad(loss))(SCORES)
    assert value == pytest.approx(bradley_terry_oracle(SCORES, margins, coefficient), rel=1e-12)
    expected = differences(lambda s: bradley_terry_oracle(s, margins, coefficient), SCORES)
    np.testing.assert_allclose(grad, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_sum_of_the_paper_in_value_and_gradient(smoothing):
    # Catches a mean over tokens in place of a sum, policy and reference exchanged, smoothing on the wrong side.
    with jax.enable_x64(True):
        loss = lambda logp: DPO(0.7, smoothing)(dpo_inputs(logp))[0].value  # noqa: E731
        value, grad = jit(jax.value_and_grad(loss))(LOGP)
    assert value == pytest.approx(dpo_oracle(LOGP, REF, LENGTHS, 0.7, smoothing), rel=1e-12)
    expected = differences(lambda logp: dpo_oracle(logp, REF, LENGTHS, 0.7, smoothing), LOGP)
    np.testing.assert_allclose(grad, expected, rtol=1e-7, atol=1e-9)
    assert np.all(np.asarray(grad)[~MASK] == 0) and np.all(np.asarray(grad)[MASK] != 0)


def test_junk_behind_the_end_of_a_completion_does_not_matter():
    # Catches a mask that multiplies: inf times 0 is no number, in the value or in the gradient.
    junk = np.where(MASK, LOGP, np.inf).astype(np.float32), np.where(MASK, REF, np.nan).astype(np.float32)
    clean = np.where(MASK, LOGP, 0).astype(np.float32), np.where(MASK, REF, 0).astype(np.float32)
    run = jit(jax.value_and_grad(lambda logp, ref: DPO()(dpo_inputs(logp, ref))[0].value))
    for ours, wanted in zip(run(*junk), run(*clean), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_the_parts_of_a_batch_add_up_to_it():
    # Catches a count of rows, or a loss that is divided before its parts are added.
    scores, margins = np.float32(SCORES), np.float32(MARGINS)
    run = jit(lambda scores, margins: bradley_terry(scores, margins, center_rewards_coefficient=0.1))
    whole, metrics = run(scores, margins)
    parts = [run(scores[s], margins[s]) for s in (slice(2), slice(2, 8))]
    assert sum((part.total for part, _ in parts)) == pytest.approx(float(whole.total), rel=1e-6)
    assert sum((part.count for part, _ in parts)) == whole.count == 4
    summed = added([m for _, m in parts])
    for name, metric in metrics.items():
        assert summed[name].value == pytest.approx(float(metric.value), rel=1e-6), name


def test_a_score_that_leaves_nothing_open_counts_as_half_right():
    # Catches an untrained model with an accuracy of 0 or 1.
    _, metrics = jit(bradley_terry)(np.float32([1, 1, 2, 1, 0, 1, 3, 2]), np.zeros(8, np.float32))
    assert metrics["accuracy"].value == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    assert (metrics["min_reward"].value, metrics["max_reward"].value) == (0, 3)


def test_the_metrics_of_dpo_are_those_of_its_rewards():
    # Catches margins without beta, and log-probs averaged over tokens.
    rewards = np.array([0.7 * sum(LOGP[i, :n] - REF[i, :n]) for i, n in enumerate(LENGTHS)])
    found = jit(implicit_rewards)(np.float32(LOGP), np.float32(REF), MASK, 0.7)
    np.testing.assert_allclose(found, rewards, rtol=1e-5)
    _, metrics = jit(lambda logp, ref: DPO(0.7)(dpo_inputs(logp, ref)))(np.float32(LOGP), np.float32(REF))
    assert metrics["rewards/chosen"].value == pytest.approx(rewards[0::2].mean(), rel=1e-5)
    assert metrics["rewards/margins"].value == pytest.approx((rewards[0::2] - rewards[1::2]).mean(), rel=1e-5)
    assert metrics["rewards/accuracies"].value == pytest.approx((rewards[0::2] > rewards[1::2]).mean())
    logps = [sum(LOGP[i, :n]) for i, n in enumerate(LENGTHS)]
    assert metrics["logps/rejected"].value == pytest.approx(np.mean(logps[1::2]), rel=1e-5)


def test_dpo_without_a_reference_is_an_error():
    # Catches a reference of zeros, with which the policy would only be made longer or shorter.
    with pytest.raises(ValueError, match="needs ref_logp_BC"):
        DPO()(dpo_inputs(np.float32(LOGP), None))
