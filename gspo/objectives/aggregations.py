"""Aggregations: from a value per token, [B, C], to one `Mean` over the batch.

The count depends on the mask alone. So gradients of `total` may be summed over micro-batches and devices and divided
once by the summed count, which is exact; and rows with an empty mask, or columns of padding, add nothing to either.
"""

import chex
import jax.numpy as jnp

from gspo import masked
from gspo.masked import Mean


def _rows(mask_BC):
    return jnp.any(mask_BC, axis=1)


def seq_mean_token_mean(x_BC: chex.Array, mask_BC: chex.Array) -> Mean:
    """1/B Σ_i 1/|y_i| Σ_t x_it: sequences count alike. GRPO (2402.03300) eq. 3, GSPO (2507.18071) eq. 2, 5 and 13."""
    return masked.masked_mean(masked.row_means(x_BC, mask_BC), _rows(mask_BC))


def token_mean(x_BC: chex.Array, mask_BC: chex.Array) -> Mean:
    """1/Σ_i |y_i| Σ_i Σ_t x_it: tokens count alike, so long sequences count more. DAPO (2503.14476) eq. 8."""
    return masked.masked_mean(x_BC, mask_BC)


def seq_mean_token_sum(x_BC: chex.Array, mask_BC: chex.Array) -> Mean:
    """1/B Σ_i Σ_t x_it. With x constant along a row, |y_i| times its sequence-level loss: LUSPO (2602.05261)."""
    return masked.masked_mean(masked.masked_sum(masked.at_least_float32(x_BC), mask_BC, axis=1), _rows(mask_BC))


def seq_mean_token_sum_norm(x_BC: chex.Array, mask_BC: chex.Array, *, length: int | None = None) -> Mean:
    """1/B Σ_i 1/length Σ_t x_it, with one constant length for all. Dr. GRPO (2503.20783) §3.2. None: the frame's width
    C."""
    rows = seq_mean_token_sum(x_BC, mask_BC)
    return Mean(rows.total, rows.count * (length or mask_BC.shape[1]))


AGGREGATIONS = {
    "seq-mean-token-mean": seq_mean_token_mean,
    "token-mean": token_mean,
    "seq-mean-token-sum": seq_mean_token_sum,
    "seq-mean-token-sum-norm": seq_mean_token_sum_norm,
}
