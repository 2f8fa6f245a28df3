"""Surrogates: from log-ratios and advantages to a value per token that is to be maximised.

All share one signature,

    surrogate(log_ratio_BC, inputs, *, constants) -> Surrogate

where log_ratio_BC is [B, C] or [B, 1] (see `gspo.objectives.ratios`), inputs are `LossInputs` and the constants are
Python floats (CONSTANTS says which). They know nothing of the ratio's level or of the aggregation; `gspo.objectives`
composes them. Inputs are finite at masked positions too, where the value means nothing; `Objective` sees to both.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gspo import masked
from gspo.objectives.ratios import ratio
from gspo.types import LossInputs


class Surrogate(NamedTuple):
    """value_BC: to be maximised. low_BC, high_BC: bool, where the lower or the upper edge cuts the gradient off (or
    caps it).

    A ratio outside the range is cut only on the side that the advantage pushes it towards: w < 1 − ε with Â < 0, w > 1
    + ε with Â > 0. The other two quadrants keep their gradient, and are not counted. This is TRL's count as well.
    """

    value_BC: chex.Array
    low_BC: chex.Array
    high_BC: chex.Array


def _floats(log_ratio_BC, inputs: LossInputs):
    """Checks shapes; returns log-ratios, log-probs and advantages as float32 or wider."""
    logp_BC, advantages_BC, mask_BC = inputs.logp_BC, inputs.advantages_BC, inputs.mask_BC
    chex.assert_rank([log_ratio_BC, logp_BC, advantages_BC, mask_BC], 2)
    chex.assert_equal_shape([logp_BC, advantages_BC, mask_BC])
    chex.assert_is_broadcastable(log_ratio_BC.shape, logp_BC.shape)
    chex.assert_type(mask_BC, bool)
    return tuple(masked.at_least_float32(x) for x in (log_ratio_BC, logp_BC, advantages_BC))


def _outside(ratio_BC, advantages_BC, low: float, high: float):
    """Where the clip to [low, high] is active: (w < low and Â < 0), (w > high and Â > 0)."""
    return (ratio_BC < low) & (advantages_BC < 0), (ratio_BC > high) & (advantages_BC > 0)


def clip(log_ratio_BC: chex.Array, inputs: LossInputs, *, epsilon: float, epsilon_high: float) -> Surrogate:
    """min( w Â, clip(w, 1 − ε, 1 + ε_high) Â )

    PPO (1707.06347) eq. 7; one ε on each side since DAPO (2503.14476) eq. 10. With w the token ratio this is GRPO, with
    w = s_i GSPO (2507.18071) eq. 5. The minimum takes the clipped side exactly where `_outside` holds; written so, the
    gradient on the edges themselves is the unclipped one.
    """
    log_ratio_BC, _, advantages_BC = _floats(log_ratio_BC, inputs)
    ratio_BC = ratio(log_ratio_BC)
    low_BC, high_BC = _outside(ratio_BC, advantages_BC, 1 - epsilon, 1 + epsilon_high)
    clipped_BC = jnp.clip(ratio_BC, 1 - epsilon, 1 + epsilon_high)
    return Surrogate(jnp.where(low_BC | high_BC, clipped_BC, ratio_BC) * advantages_BC, low_BC, high_BC)


def dual_clip(
    log_ratio_BC: chex.Array, inputs: LossInputs, *, epsilon: float, epsilon_high: float, delta: float
) -> Surrogate:
    """min( w Â, clip(w, 1 − ε, 1 + ε_high) Â )          for Â ≥ 0
    max( min( w Â, clip(w, 1 − ε, 1 + ε_high) Â ), δ Â )  for Â < 0

    PPO has no bound where Â < 0 and w is large; this is one. Dual-clip PPO (1912.09729), where δ is called c. The
    two-sided clip of INTELLECT-2 (2505.07291), min(min(w, δ) Â, clip(w) Â), is the same function for δ > 1 + ε_high.
    Tokens held at δ count as clipped high.
    """
    inner, advantages_BC = clip(log_ratio_BC, inputs, epsilon=epsilon, epsilon_high=epsilon_high), inputs.advantages_BC
    over_BC = (ratio(log_ratio_BC) > delta) & (advantages_BC < 0)
    return Surrogate(jnp.where(over_BC, delta * advantages_BC, inner.value_BC), inner.low_BC, inner.high_BC | over_BC)


def cispo(log_ratio_BC: chex.Array, inputs: LossInputs, *, epsilon: float, epsilon_high: float) -> Surrogate:
    """sg[ clip(w, 1 − ε, 1 + ε_high) ] Â log π_θ

    The clip bounds the weight of a token and never its gradient, which flows through log π alone. CISPO, MiniMax-M1
    (2506.13585) §3.1, eq. 4-5; ε = 1 is their "no lower bound", and 1 + ε_high = 5 is the cap of ScaleRL (2510.13786).
    Every token whose weight is capped counts as clipped, whatever the sign of its advantage (TRL counts those with Â >
    0 only)."""
    log_ratio_BC, logp_BC, advantages_BC = _floats(log_ratio_BC, inputs)
    ratio_BC = jax.lax.stop_gradient(ratio(log_ratio_BC))
    weight_BC = jnp.clip(ratio_BC, 1 - epsilon, 1 + epsilon_high)
    live_BC = advantages_BC != 0
    return Surrogate(
        weight_BC * advantages_BC * logp_BC, (ratio_BC < 1 - epsilon) & live_BC, (ratio_BC > 1 + epsilon_high) & live_BC
    )


def gmpo(log_ratio_BC: chex.Array, inputs: LossInputs, *, epsilon: float, epsilon_high: float) -> Surrogate:
    """exp( 1/|y_i| Σ_t m_it ) Â_it,   m_it = log w_it, clipped to ≤ ε_high where Â_it > 0 and to ≥ −ε where Â_it < 0

    A geometric mean of token ratios, like s_i, but each token is clipped before the mean, and in log space. GMPO
    (2507.20673), ε = 0.4 on both sides. Takes token log-ratios. It is GSPO where nothing clips.
    """
    log_ratio_BC, logp_BC, advantages_BC = _floats(log_ratio_BC, inputs)
    chex.assert_equal_shape([log_ratio_BC, logp_BC])
    low_BC = (log_ratio_BC < -epsilon) & (advantages_BC < 0)
    high_BC = (log_ratio_BC > epsilon_high) & (advantages_BC > 0)
    clipped_BC = jnp.where(low_BC | high_BC, jnp.clip(log_ratio_BC, -epsilon, epsilon_high), log_ratio_BC)
    s_B1 = ratio(masked.row_means(clipped_BC, inputs.mask_BC))[:, None]
    return Surrogate(s_B1 * advantages_BC, low_BC, high_BC)


def sapo(log_ratio_BC: chex.Array, inputs: LossInputs, *, temperature_pos: float, temperature_neg: float) -> Surrogate:
    """4/τ σ( τ (w − 1) ) Â,   τ = τ_pos where Â > 0, else τ_neg

    A soft gate instead of a clip: its slope is 1 at w = 1 and fades on both sides, 4 σ(1 − σ). SAPO (2511.20347),
    τ_pos = 1.0, τ_neg = 1.05. Nothing is ever counted as clipped.
    """
    log_ratio_BC, _, advantages_BC = _floats(log_ratio_BC, inputs)
    tau_BC = jnp.where(advantages_BC > 0, temperature_pos, temperature_neg)
    gate_BC = 4 / tau_BC * jax.nn.sigmoid(tau_BC * (ratio(log_ratio_BC) - 1))
    never_BC = jnp.zeros_like(inputs.mask_BC)
    return Surrogate(gate_BC * advantages_BC, never_BC, never_BC)


def minirl(
    log_ratio_BC: chex.Array, inputs: LossInputs, *, epsilon: float, epsilon_high: float, cap: float
) -> Surrogate:
    """M sg[ min(w, cap) ] Â log π_θ,   M = 0 where w > 1 + ε_high and Â > 0, or w < 1 − ε and Â < 0;  else 1

    PPO's clip condition as a mask on a REINFORCE gradient whose weight is truncated. MiniRL, "Stabilizing Reinforcement
    Learning with LLMs" (2512.01374) §3: ε = 0.2, ε_high = 0.27, cap = 5, tokens summed over each sequence, Â = r −
    mean."""
    log_ratio_BC, logp_BC, advantages_BC = _floats(log_ratio_BC, inputs)
    ratio_BC = jax.lax.stop_gradient(ratio(log_ratio_BC))
    low_BC, high_BC = _outside(ratio_BC, advantages_BC, 1 - epsilon, 1 + epsilon_high)
    weight_BC = jnp.where(low_BC | high_BC, 0, jnp.minimum(ratio_BC, cap))
    return Surrogate(weight_BC * advantages_BC * logp_BC, low_BC, high_BC)


def reinforce(log_ratio_BC: chex.Array, inputs: LossInputs) -> Surrogate:
    """Â log π_θ

    Williams (1992). No ratio: right for one update per rollout, biased by staleness after it. The gradient of every
    surrogate of this file is this one where all ratios are 1.
    """
    log_ratio_BC, logp_BC, advantages_BC = _floats(log_ratio_BC, inputs)
    never_BC = jnp.zeros_like(inputs.mask_BC)
    return Surrogate(advantages_BC * logp_BC, never_BC, never_BC)


SURROGATES = {
    "clip": clip,
    "dual_clip": dual_clip,
    "cispo": cispo,
    "gmpo": gmpo,
    "sapo": sapo,
    "minirl": minirl,
    "reinforce": reinforce,
}

# Settings that each takes as keywords, by their names in `gspo.objectives.presets.DEFAULTS`.
CONSTANTS = {
    "clip": ("epsilon", "epsilon_high"),
    "dual_clip": ("epsilon", "epsilon_high", "delta"),
    "cispo": ("epsilon", "epsilon_high"),
    "gmpo": ("epsilon", "epsilon_high"),
    "sapo": ("temperature_pos", "temperature_neg"),
    "minirl": ("epsilon", "epsilon_high", "cap"),
    "reinforce": (),
}
