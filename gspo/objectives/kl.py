"""Estimators of KL(π_θ ‖ π_ref) from the log-probabilities of the sampled tokens alone (Schulman, "Approximating KL
divergence").

With d = log π_ref − log π_θ at a sampled token. "Value" says whether the expectation is the KL. "Gradient" says what
descending the estimator, put into a loss and averaged over samples of π_θ, descends in expectation:

    estimator            value     gradient
    k1 = −d              unbiased  0: it does not pull at all
    k2 = d²/2            biased    the gradient of KL(π_θ ‖ π_ref), exactly
    k3 = exp(d) − d − 1  unbiased  that of KL(π_ref ‖ π_θ), the other direction: biased

The samples come from π_old, and stop being samples of π_θ after the first update. An importance weight w = π_θ/π_old
corrects it:

    weight          with k1                   with k2                  with k3
    none            the above, at π_θ = π_old; off-policy all are biased
    stopped         sg[w] k: the table above, off-policy too
    differentiable  value and gradient exact  biased in both           value and gradient exact

`differentiable` with k3 is the unbiased estimate of DeepSeek-V3.2 (2512.02556) §3.1. All functions map [B, C] to [B,
C]."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from gspo import masked
from gspo.objectives.ratios import log_ratio_token, ratio
from gspo.types import LossInputs


def _log_ref_ratio(logp_BC, ref_logp_BC):
    chex.assert_rank([logp_BC, ref_logp_BC], 2)
    chex.assert_equal_shape([logp_BC, ref_logp_BC])
    return masked.at_least_float32(ref_logp_BC) - masked.at_least_float32(logp_BC)


def k1(logp_BC: chex.Array, ref_logp_BC: chex.Array) -> chex.Array:
    """−d. Unbiased in value; as a loss it has no expected gradient, unless weighted by a differentiable ratio."""
    return -_log_ref_ratio(logp_BC, ref_logp_BC)


def k2(logp_BC: chex.Array, ref_logp_BC: chex.Array) -> chex.Array:
    """d²/2. Biased in value; its expected gradient is that of KL(π_θ ‖ π_ref)."""
    return jnp.square(_log_ref_ratio(logp_BC, ref_logp_BC)) / 2


def k3(logp_BC: chex.Array, ref_logp_BC: chex.Array) -> chex.Array:
    """exp(d) − d − 1 ≥ 0. Unbiased in value with a low variance; its gradient is that of KL(π_ref ‖ π_θ).

    d is held at 20, where exp would go on to overflow: a token that the policy has all but lost (π_ref/π_θ > 5·10⁸)
    keeps its value of the loss and gives no gradient.
    """
    d_BC = jnp.minimum(_log_ref_ratio(logp_BC, ref_logp_BC), 20.0)
    return jnp.exp(d_BC) - d_BC - 1


KL_LOSSES = {"k1": k1, "k2": k2, "k3": k3}


def unweighted(logp_BC: chex.Array, old_logp_BC: chex.Array, mask_BC: chex.Array) -> chex.Array:
    """1: the estimator as it is."""
    return jnp.ones_like(log_ratio_token(logp_BC, old_logp_BC, mask_BC))


def stopped_ratio(logp_BC: chex.Array, old_logp_BC: chex.Array, mask_BC: chex.Array) -> chex.Array:
    """sg[w]: averages over π_θ although the samples are of π_old; the gradient stays that of the estimator."""
    return jax.lax.stop_gradient(ratio(log_ratio_token(logp_BC, old_logp_BC, mask_BC)))


def differentiable_ratio(logp_BC: chex.Array, old_logp_BC: chex.Array, mask_BC: chex.Array) -> chex.Array:
    """w: also differentiates the distribution that the samples come from, which makes k1 and k3 exact."""
    return ratio(log_ratio_token(logp_BC, old_logp_BC, mask_BC))


KL_WEIGHTS = {"none": unweighted, "stopped": stopped_ratio, "differentiable": differentiable_ratio}


def kl_penalty(inputs: LossInputs, *, estimator: Callable, weight: Callable) -> chex.Array:
    """w · k_n per token, to be added to the loss: a distance from the reference policy                     [B, C]"""
    weight_BC = weight(inputs.logp_BC, inputs.old_logp_BC, inputs.mask_BC)
    return weight_BC * estimator(inputs.logp_BC, inputs.ref_logp_BC)


def certainty(inputs: LossInputs) -> chex.Array:
    """−H(π_θ(·|x, y_<t)) per token, to be added to the loss: the entropy bonus as a penalty                [B, C]"""
    return -inputs.entropy_BC
