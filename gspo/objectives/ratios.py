"""Importance ratios π_θ/π_old, as logarithms, at the four levels a method can take them.

This is where GRPO and GSPO differ, and the only place: `log_ratio_token` against `log_ratio_sequence`.

Every function maps (logp_BC, old_logp_BC, mask_BC) to a log-ratio that broadcasts to [B, C]: [B, C] where each token
has its own, [B, 1] where the tokens of a row share one. Gradients flow to logp. Masked positions give 0 and may hold
inf or NaN."""

import chex
import jax
import jax.numpy as jnp

from gspo import masked
from gspo.types import LossInputs

MAX_LOG_RATIO = 20.0


def ratio(log_ratio: chex.Array) -> chex.Array:
    """w = exp(min(log w, 20)), so that no value or gradient overflows float32, whatever the length of a sequence.

    Only the upper end needs it: exp underflows to 0 cleanly. The cap cannot change a result whose upper clip is active,
    since e²⁰ ≈ 5·10⁸ is past every clip range. It does change what no clip covers, Â < 0 without `delta`: there the
    value is held at e²⁰ Â and the gradient is 0, where the formula asks for a gradient of 5·10⁸ or more.
    """
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def log_ratio_token(logp_BC: chex.Array, old_logp_BC: chex.Array, mask_BC: chex.Array) -> chex.Array:
    """log w_it = log π_θ(y_it | x, y_i<t) − log π_old(y_it | x, y_i<t)                       [B, C]

    One ratio per token. GRPO, DeepSeekMath (2402.03300) eq. 3; eq. 3 of GSPO (2507.18071).
    """
    chex.assert_rank([logp_BC, old_logp_BC, mask_BC], 2)
    chex.assert_equal_shape([logp_BC, old_logp_BC, mask_BC])
    chex.assert_type(mask_BC, bool)
    return jnp.where(mask_BC, masked.at_least_float32(logp_BC) - masked.at_least_float32(old_logp_BC), 0)


def log_ratio_sequence(logp_BC: chex.Array, old_logp_BC: chex.Array, mask_BC: chex.Array) -> chex.Array:
    """log s_i = 1/|y_i| Σ_t log w_it                                                       [B, 1]

    The length-normalised ratio of a sequence, a geometric mean of token ratios. GSPO (2507.18071) §4.1, eq. 7. With
    independent tokens of deviation σ its deviation is σ/√|y_i|: clip ranges fit for |y| in the thousands are far too
    tight for |y| = 50."""
    return masked.row_means(log_ratio_token(logp_BC, old_logp_BC, mask_BC), mask_BC)[:, None]


def log_ratio_sequence_token(logp_BC: chex.Array, old_logp_BC: chex.Array, mask_BC: chex.Array) -> chex.Array:
    """log s_it = sg[log s_i] + log π_θ(y_it) − sg[log π_θ(y_it)]                             [B, C]

    The value of s_i, the gradient of one token: advantages may then differ from token to token. GSPO-token, GSPO
    (2507.18071) §4.3, eq. 14. With equal advantages along a row it is GSPO in value, gradient and clip condition.
    """
    log_s_B1 = log_ratio_sequence(logp_BC, old_logp_BC, mask_BC)
    logp_BC = jnp.where(mask_BC, masked.at_least_float32(logp_BC), 0)
    return jax.lax.stop_gradient(log_s_B1) + (logp_BC - jax.lax.stop_gradient(logp_BC))


def log_ratio_sequence_sum(logp_BC: chex.Array, old_logp_BC: chex.Array, mask_BC: chex.Array) -> chex.Array:
    """log S_i = Σ_t log w_it = log π_θ(y_i|x) − log π_old(y_i|x)                            [B, 1]

    The product of token ratios: the unbiased importance weight of a sequence, with a variance that grows with |y_i|.
    GSPO (2507.18071) eq. 6 without its exponent 1/|y_i|.
    """
    return masked.masked_sum(log_ratio_token(logp_BC, old_logp_BC, mask_BC), mask_BC, axis=1)[:, None]


LOG_RATIOS = {
    "token": log_ratio_token,
    "sequence": log_ratio_sequence,
    "sequence_token": log_ratio_sequence_token,
    "sequence_sum": log_ratio_sequence_sum,
}


def router_shift(inputs: LossInputs, *, floor: float) -> chex.Array:
    """log γ_it = max( −1/(L X) Σ_l Σ_k |log p_θ(e_k) − log p_old(e_k)| , log floor ),  no gradient     [B, C]

    How far the routers moved away under a token, over the experts e_1..e_X that the old policy chose for it: γ = 1 for
    routers that did not move, never below `floor`. It multiplies the token's importance ratio before the clip.
    RSPO (2510.23027), router-shift ratio. Reads router_logp_LBCX, log-probabilities that the routers of the current
    policy give to the experts chosen by the old one, and old_router_logp_LBCX, what the old routers gave them.
    """
    router_logp_LBCX, old_router_logp_LBCX, mask_BC = (
        inputs.router_logp_LBCX,
        inputs.old_router_logp_LBCX,
        inputs.mask_BC,
    )
    chex.assert_shape(router_logp_LBCX, (None, *mask_BC.shape, None))
    chex.assert_equal_shape([router_logp_LBCX, old_router_logp_LBCX])
    moved_LBCX = jnp.abs(masked.at_least_float32(router_logp_LBCX) - masked.at_least_float32(old_router_logp_LBCX))
    log_gamma_BC = jnp.maximum(-jnp.mean(moved_LBCX, axis=(0, 3)), jnp.log(floor))
    return jax.lax.stop_gradient(jnp.where(mask_BC, log_gamma_BC, 0))
