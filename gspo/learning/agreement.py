"""The invariant that is always on: before the first update of a rollout, sampler and learner give the same tokens the
same log-probs, up to rounding.

It catches stale sampler weights, a temperature that slipped, rows that were moved, wrong masks. Two numbers are
bounded, since each misses what the other sees. The largest difference, but for one token in a thousand: a router whose
experts nearly tie may choose another one by rounding, and moves few tokens far (measured in float32: about one token in
a million; in tests/learning/test_router_ties.py). And the mean, as KL(sampler ‖ learner) by k3, which sees weights one
rollout old also in bfloat16, where rounding hides them from a bound on single tokens.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gspo.masked import masked_mean
from gspo.objectives.diagnostics import all_but_few
from gspo.objectives.ratios import ratio

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}  # |log-ratio| of all but few tokens
# k3 per token. Measured on the running sums with 8 experts, before the first update and after one: 0 and 4e-3 to 2e-2
# in float32, up to 1e-8 and 2e-3 to 2e-2 in bfloat16.
MEAN_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-3}


class Gap(NamedTuple):
    """How far two log-probs of the same tokens are apart: largest |difference| but for few tokens, and k3 per token."""

    abs_most: chex.Array | float
    k3: chex.Array | float


@jax.jit
def gap_between(sampler_logp_BC: chex.Array, learner_logp_BC: chex.Array, mask_BC: chex.Array) -> Gap:
    """Over the tokens of the mask, of which there may be none."""
    difference_BC = jnp.where(mask_BC, learner_logp_BC - sampler_logp_BC, 0.0)
    k3_BC = ratio(difference_BC) - 1 - difference_BC
    return Gap(all_but_few(jnp.abs(difference_BC), mask_BC), masked_mean(k3_BC, mask_BC).value)


def complaint(gap: Gap, dtype: str, tolerance: float | None) -> str | None:
    """What is wrong with a gap, or None. tolerance: check_tolerance of the config; None: by the dtype."""
    most = TOLERANCE[dtype] if tolerance is None else tolerance
    mean = MEAN_TOLERANCE[dtype] * max(most / TOLERANCE[dtype], 1)  # who allows more of tokens allows more of the mean
    causes = "the old log-probs are not those of this policy (stale weights, another temperature, a wrong mask)"
    if not gap.abs_most <= most:
        return (
            f"before the first update sampler and learner differ by {gap.abs_most:.2e} in the log-prob of more than "
            f"one token in a thousand, which is above check_tolerance={most:g}; {causes}"
        )
    if not gap.k3 <= mean:
        return (
            f"before the first update sampler and learner differ by a KL of {gap.k3:.2e} per token, more than "
            f"the {mean:g} that goes with check_tolerance={most:g} in {dtype}; {causes}"
        )
    return None
