"""Weights for a loss whose completions were drawn from a policy other than π_old: the sampler's μ, or one that is too
stale.

A sampler with other kernels, another precision or other routes draws from μ ≠ π_old although both hold the same
parameters. The correction is ρ = π_old/μ, taken at some level and kept in bounds in some way. No gradient flows through
any of these weights."""

import chex
import jax
import jax.numpy as jnp

from gspo import masked
from gspo.objectives.ratios import log_ratio_sequence, log_ratio_sequence_sum, log_ratio_token, ratio
from gspo.types import LossInputs


def truncate(rho_BC: chex.Array, low: float, high: float) -> chex.Array:
    """min( max(ρ, low), high ): every token stays, none weighs more than `high`. Biased towards μ, low variance."""
    return jnp.clip(rho_BC, low, high)


def mask(rho_BC: chex.Array, low: float, high: float) -> chex.Array:
    """ρ · 1[low ≤ ρ ≤ high]: what μ and π_old disagree about too much is left out."""
    return jnp.where((rho_BC >= low) & (rho_BC <= high), rho_BC, 0)


def reject(rho_BC: chex.Array, low: float, high: float) -> chex.Array:
    """1[low ≤ ρ ≤ high]: as `mask`, but ρ only decides and does not weigh."""
    return ((rho_BC >= low) & (rho_BC <= high)).astype(rho_BC.dtype)


# name: (level of ρ, bound, low, high)
#   tis               truncated importance sampling: Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You
#                     Off-Policy RL Training"
#   mis               its masked variant: Liu et al. (2025), "When Speed Kills Stability"
#   seq_tis, seq_mis  both, with the product over the sequence; same source
#   icepop            a band with two sides: Ling team (2025), "Small Leak Can Sink a Great Ship"
#   geo_rs            whole sequences are rejected by the geometric mean of their token ratios
SAMPLER_IS = {
    "tis": (log_ratio_token, truncate, 0.0, 2.0),
    "mis": (log_ratio_token, mask, 0.0, 2.0),
    "icepop": (log_ratio_token, mask, 0.5, 5.0),
    "seq_tis": (log_ratio_sequence_sum, truncate, 0.0, 2.0),
    "seq_mis": (log_ratio_sequence_sum, mask, 0.0, 2.0),
    "geo_rs": (log_ratio_sequence, reject, 0.999, 1.001),
}


def sampler_weight(inputs: LossInputs, *, log_ratio, bound, low: float, high: float) -> chex.Array:
    """bound( ρ ),   log ρ = log π_old − log μ at the level of `log_ratio`                    [B, C] or [B, 1]

    log_ratio: one of `gspo.objectives.ratios`; bound: `truncate`, `mask` or `reject`.
    """
    log_rho_BC = log_ratio(inputs.old_logp_BC, inputs.sampler_logp_BC, inputs.mask_BC)
    return jax.lax.stop_gradient(bound(ratio(log_rho_BC), low, high))


def off_policy_mask(inputs: LossInputs, *, threshold: float) -> chex.Array:
    """0 where Â_it < 0 and 1/|y_i| Σ_t log( π_sampled / π_θ ) > δ;  else 1                   [B, C]

    Failures that the current policy would hardly produce any more teach it little and push it far. OPSM, DeepSeek-V3.2
    (2512.02556) §3.1; π_sampled: the sampler's where known, else the old policy's.
    """
    sampled_logp_BC = inputs.old_logp_BC if inputs.sampler_logp_BC is None else inputs.sampler_logp_BC
    drift_B1 = -log_ratio_sequence(inputs.logp_BC, sampled_logp_BC, inputs.mask_BC)
    dropped_BC = (inputs.advantages_BC < 0) & (drift_B1 > threshold)
    return jax.lax.stop_gradient(jnp.where(dropped_BC, 0, masked.at_least_float32(jnp.ones_like(inputs.mask_BC))))
