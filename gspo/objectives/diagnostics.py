"""What an objective reports about itself. Everything is computed on the whole arrays it is given, outside the gradient,
and says how it adds up over the updates of a rollout (`gspo.masked`): shares, means and extremes exactly; quantiles,
variances and effective sample sizes are those of an update, and a rollout has their mean.

Clip shares. A token is clipped where its surrogate says so (`Surrogate.low_BC`, `high_BC`); a sequence is clipped where
at least one of its tokens is. With a ratio per sequence all tokens of a sequence are clipped together.

    clip_ratio/tokens_low, tokens_high, tokens            share of tokens: what Fig. 2 of GSPO shows, and verl logs
    clip_ratio/sequences_low, sequences_high, sequences   share of sequences
    clip_ratio/low_mean, high_mean, region_mean           TRL's names: the share of whatever has a ratio of its own,
                                                          sequences for the levels "sequence" and "sequence_sum", tokens
                                                          for the others

Ratios. `ratio/*` and `ess` describe the ratios of the level, one per token or one per sequence, before any clip, capped
at e²⁰. `ess` is (Σ w)² / (n Σ w²) in (0, 1]: the share of the batch that an importance-weighted mean effectively uses.

    log_ratio/abs_max        largest |log w_it| of any token: 0 on the first minibatch after a rollout, up to rounding
    log_ratio/abs_p999       the same but for one token in a thousand
    log_ratio/token_var      variance of log w_it over tokens
    log_ratio/sequence_var   variance of log s_i, the length-normalised log-ratio, over sequences
    approx_kl/k1, k3         KL(π_old ‖ π_θ) per token, estimated by −log w and by w − 1 − log w
    kl                       KL(π_θ ‖ π_ref) per token, by k3 and without a coefficient; as TRL logs it
    loss, loss/policy        the loss, and its part without the penalties
"""

import chex
import jax.numpy as jnp

from gspo import masked
from gspo.masked import Max, Metrics, Min, masked_mean, over_updates
from gspo.objectives.ratios import ratio


def _variance(x, mask):
    return masked_mean(jnp.square(x - masked_mean(x, mask).value), mask).value


def _largest(x, mask):
    return Max(jnp.max(x, initial=-jnp.inf, where=mask))


def clip_shares(low_BC: chex.Array, high_BC: chex.Array, mask_BC: chex.Array, *, per_sequence: bool) -> Metrics:
    """Shares of clipped tokens and sequences. per_sequence: whether one ratio serves a whole sequence (TRL's names
    follow it)."""
    chex.assert_equal_shape([low_BC, high_BC, mask_BC])
    rows_B = jnp.any(mask_BC, axis=1)
    shares = {}
    for side, cut_BC in (("_low", low_BC), ("_high", high_BC), ("", low_BC | high_BC)):
        shares[f"tokens{side}"] = masked_mean(cut_BC, mask_BC)
        shares[f"sequences{side}"] = masked_mean(jnp.any(cut_BC & mask_BC, axis=1), rows_B)
    unit = "sequences" if per_sequence else "tokens"
    shares |= {"low_mean": shares[f"{unit}_low"], "high_mean": shares[f"{unit}_high"], "region_mean": shares[unit]}
    return {f"clip_ratio/{name}": share for name, share in shares.items()}


def ratio_summary(log_ratio_BC: chex.Array, mask_BC: chex.Array) -> Metrics:
    """Minimum, mean, maximum, 99th percentile and effective sample size of the ratios. [B, 1]: one ratio per row."""
    if log_ratio_BC.shape[1] != mask_BC.shape[1]:
        mask_BC = jnp.any(mask_BC, axis=1, keepdims=True)
    w_BC, seen = ratio(log_ratio_BC), jnp.any(mask_BC)
    mean, mean_square = masked_mean(w_BC, mask_BC), masked_mean(jnp.square(w_BC), mask_BC).value
    return {
        "ratio/min": Min(jnp.min(w_BC, initial=jnp.inf, where=mask_BC)),
        "ratio/mean": mean,
        "ratio/max": _largest(w_BC, mask_BC),
        "ratio/p99": over_updates(jnp.nanquantile(jnp.where(mask_BC, w_BC, jnp.nan), 0.99), seen),
        "ess": over_updates(jnp.square(mean.value) / jnp.where(mean_square > 0, mean_square, 1), seen),
    }


def all_but_few(x_BC: chex.Array, mask_BC: chex.Array, share: float = 1e-3) -> chex.Array:
    """The least value that at most this share of the tokens exceed, in fewer than 1 / share tokens at most one; 0
    without tokens."""
    value = jnp.nanquantile(jnp.where(mask_BC, x_BC, jnp.nan), 1 - share, method="lower")
    return jnp.where(jnp.any(mask_BC), value, 0)


def drift(token_log_ratio_BC: chex.Array, mask_BC: chex.Array) -> Metrics:
    """How far the policy is from the one that produced the rollout, whatever the level of the objective."""
    rows_B, seen = jnp.any(mask_BC, axis=1), jnp.any(mask_BC)
    sequence_log_ratio_B = masked.row_means(token_log_ratio_BC, mask_BC)
    return {
        "log_ratio/abs_max": _largest(jnp.abs(token_log_ratio_BC), mask_BC),
        "log_ratio/abs_p999": over_updates(all_but_few(jnp.abs(token_log_ratio_BC), mask_BC), seen),
        "log_ratio/token_var": over_updates(_variance(token_log_ratio_BC, mask_BC), seen),
        "log_ratio/sequence_var": over_updates(_variance(sequence_log_ratio_B, rows_B), seen),
        "approx_kl/k1": masked_mean(-token_log_ratio_BC, mask_BC),
        "approx_kl/k3": masked_mean(ratio(token_log_ratio_BC) - 1 - token_log_ratio_BC, mask_BC),
    }


def advantage_moments(advantages_BC: chex.Array, mask_BC: chex.Array) -> Metrics:
    """Mean, standard deviation and extremes of the advantages, over tokens."""
    return {
        "advantage/mean": masked_mean(advantages_BC, mask_BC),
        "advantage/std": over_updates(jnp.sqrt(_variance(advantages_BC, mask_BC)), jnp.any(mask_BC)),
        "advantage/abs_max": _largest(jnp.abs(advantages_BC), mask_BC),
    }


def sampler_gap(
    old_logp_BC: chex.Array, sampler_logp_BC: chex.Array, weight_BC: chex.Array, mask_BC: chex.Array
) -> Metrics:
    """Distance between the sampler's log-probs and the learner's on the same tokens, and what the correction makes of
    it.

    sampler/k1, k3: KL(μ ‖ π_old) per token; sampler/abs_max: largest |log π_old − log μ|; sampler/weight_mean: mean
    weight of a token after all corrections; sampler/kept: share of tokens whose weight is not 0.
    """
    log_rho_BC = jnp.where(mask_BC, old_logp_BC - sampler_logp_BC, 0)
    weight_BC = jnp.broadcast_to(weight_BC, mask_BC.shape)
    return {
        "sampler/k1": masked_mean(-log_rho_BC, mask_BC),
        "sampler/k3": masked_mean(ratio(log_rho_BC) - 1 - log_rho_BC, mask_BC),
        "sampler/abs_max": _largest(jnp.abs(log_rho_BC), mask_BC),
        "sampler/weight_mean": masked_mean(weight_BC, mask_BC),
        "sampler/kept": masked_mean(weight_BC != 0, mask_BC),
    }
