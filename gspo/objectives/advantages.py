"""Advantages: how much better a completion, or a token, was than expected.

Rewards come as rewards_B for B = Q · G rows, the G completions of a prompt being neighbours. Outcome methods give one
value per row; `gae` gives one per token. Both jax and NumPy arrays will do.
"""

import chex
import jax
import jax.numpy as jnp

from gspo import masked
from gspo.types import UserError

EPSILON = 1e-6


def _groups(rewards_B: chex.Array, num_generations: int) -> chex.Array:
    """[B] -> [Q, G] float32."""
    chex.assert_rank(rewards_B, 1)
    if num_generations < 2:
        raise UserError(
            f"num_generations: {num_generations} completion per prompt has no group to compare with; "
            "set it to 2 or more, or use a critic (advantage 'gae')"
        )
    if rewards_B.shape[0] % num_generations:
        raise UserError(f"num_generations: {rewards_B.shape[0]} rewards do not divide into groups of {num_generations}")
    return masked.at_least_float32(rewards_B).reshape(-1, num_generations)


def group_relative(rewards_B: chex.Array, num_generations: int) -> chex.Array:
    """Â_i = ( r_i − mean r ) / ( std r + 1e-6 ), mean and std over the group                 [B]

    GRPO, DeepSeekMath (2402.03300) §4.1, and GSPO (2507.18071). The papers leave std open. Here it is the sample
    deviation (ddof 1), as in TRL (which adds 1e-4), verl, slime and tunix (1e-6); with ddof 0 all advantages would be
    √(G/(G−1)) times larger. A group whose rewards are all equal gets exactly 0.
    """
    rewards_QG = _groups(rewards_B, num_generations)
    centred_QG = rewards_QG - jnp.mean(rewards_QG, axis=1, keepdims=True)
    return _unless_constant(rewards_QG, centred_QG / (jnp.std(rewards_QG, axis=1, ddof=1, keepdims=True) + EPSILON))


def batch_scaled(rewards_B: chex.Array, num_generations: int) -> chex.Array:
    """Â_i = ( r_i − mean_group r ) / ( std_batch r + 1e-6 )                                  [B]

    The group's mean but the batch's deviation, so that easy and hard prompts keep their relative weight. "Lite PPO"
    (2508.08221)."""
    rewards_QG = _groups(rewards_B, num_generations)
    centred_QG = rewards_QG - jnp.mean(rewards_QG, axis=1, keepdims=True)
    return _unless_constant(rewards_QG, centred_QG / (jnp.std(rewards_QG, ddof=1) + EPSILON))


def unscaled(rewards_B: chex.Array, num_generations: int) -> chex.Array:
    """Â_i = r_i − mean r                                                                    [B]

    Dividing by the deviation weighs prompts by their difficulty; Dr. GRPO (2503.20783) §3.2 leaves it out.
    """
    rewards_QG = _groups(rewards_B, num_generations)
    return _unless_constant(rewards_QG, rewards_QG - jnp.mean(rewards_QG, axis=1, keepdims=True))


def leave_one_out(rewards_B: chex.Array, num_generations: int) -> chex.Array:
    """Â_i = r_i − 1/(G−1) Σ_{j≠i} r_j  =  G/(G−1) ( r_i − mean r )                           [B]

    The baseline of a completion does not contain its own reward, so it is unbiased. RLOO (2402.14740) §3.3.
    """
    return unscaled(rewards_B, num_generations) * num_generations / (num_generations - 1)


def global_whitening(rewards_B: chex.Array, num_generations: int) -> chex.Array:
    """Â_i = ( r_i − mean_batch r ) / ( std_batch r + 1e-6 )                                  [B]

    No group at all: any num_generations will do. REINFORCE++ (2501.03262).
    """
    chex.assert_rank(rewards_B, 1)
    return _whiten(masked.at_least_float32(rewards_B))


def group_baseline_whitening(rewards_B: chex.Array, num_generations: int) -> chex.Array:
    """Â_i = ( c_i − mean_batch c ) / ( std_batch c + 1e-6 ),   c_i = r_i − mean_group r       [B]

    The baseline of the group, one deviation for the whole batch. REINFORCE++-baseline (2501.03262).
    """
    return _whiten(unscaled(rewards_B, num_generations))


def _whiten(x_B):
    constant = jnp.max(x_B) == jnp.min(x_B)
    return jnp.where(constant, 0, (x_B - jnp.mean(x_B)) / (jnp.std(x_B, ddof=1) + EPSILON))


def _unless_constant(rewards_QG, advantages_QG):
    """The advantages as [B], and 0 for groups of equal rewards: rounding of the mean over std + 1e-6 would not be."""
    return jnp.where(_constant(rewards_QG)[:, None], 0, advantages_QG).reshape(-1)


def _constant(rewards_QG):
    return jnp.max(rewards_QG, axis=1) == jnp.min(rewards_QG, axis=1)


ADVANTAGES = {
    "group": group_relative,
    "batch": batch_scaled,
    "none": unscaled,
    "rloo": leave_one_out,
    "reinforce++": global_whitening,
    "reinforce++_baseline": group_baseline_whitening,
}


def weighted_by_sign(advantages: chex.Array, positive: float, negative: float) -> chex.Array:
    """positive · Â where Â > 0, negative · Â elsewhere. Weights ≥ 0, so that no clip condition changes. positive < 1
    slows the loss of entropy ("The Surprising Effectiveness of Negative Reinforcement", 2506.01347)."""
    return jnp.where(advantages > 0, positive, negative) * masked.at_least_float32(advantages)


# ---------------------------------------------------------------------------- with a critic (PPO)


def token_rewards(rewards_B: chex.Array, penalty_BC: chex.Array, mask_BC: chex.Array) -> chex.Array:
    """r_it = r_i [t is the last token of row i] − penalty_it                                [B, C], 0 outside the mask

    The reward of a completion falls on its last token. penalty_BC: β k1 for a KL penalty on the reward, as in
    InstructGPT (2203.02155) §3.5; its sum over a row is then an unbiased estimate of β KL(π ‖ π_ref). Zeros for none.
    """
    chex.assert_equal_shape([penalty_BC, mask_BC])
    chex.assert_equal_shape_prefix([rewards_B, mask_BC], 1)
    after_BC = jnp.cumsum(mask_BC[:, ::-1], axis=1)[:, ::-1]  # tokens from here on, this one included
    last_BC = mask_BC & (after_BC == 1)
    return jnp.where(
        mask_BC,
        jnp.where(last_BC, masked.at_least_float32(rewards_B)[:, None], 0) - masked.at_least_float32(penalty_BC),
        0,
    )


def gae(
    rewards_BC: chex.Array, values_BC: chex.Array, mask_BC: chex.Array, gamma: float = 1.0, lam: float = 0.95
) -> tuple[chex.Array, chex.Array]:
    """δ_t = r_t + γ V_{t+1} − V_t,   Â_t = δ_t + γ λ Â_{t+1};  returns (Â_BC, Â + V as returns_BC)

    t runs over the positions where mask holds: others are skipped, so that a gap in the mask joins its two ends, and
    after the last one V = Â = 0. Not whitened. Generalised advantage estimation (1506.02438) eq. 16; λ = 1 gives
    returns minus values."""
    chex.assert_rank([rewards_BC, values_BC, mask_BC], 2)
    chex.assert_equal_shape([rewards_BC, values_BC, mask_BC])
    chex.assert_type(mask_BC, bool)
    rewards_BC = jnp.where(mask_BC, masked.at_least_float32(rewards_BC), 0)
    values_BC = jnp.where(mask_BC, masked.at_least_float32(values_BC), 0)

    def step(carry, column):
        next_advantage_B, next_value_B = carry
        reward_B, value_B, mask_B = column
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = delta_B + gamma * lam * next_advantage_B
        carry = jnp.where(mask_B, advantage_B, next_advantage_B), jnp.where(mask_B, value_B, next_value_B)
        return carry, jnp.where(mask_B, advantage_B, 0)

    start = (jnp.zeros_like(values_BC[:, 0]), jnp.zeros_like(values_BC[:, 0]))
    _, advantages_CB = jax.lax.scan(step, start, (rewards_BC.T, values_BC.T, mask_BC.T), reverse=True)
    return advantages_CB.T, advantages_CB.T + values_BC


def clipped_value_loss(
    values_BC: chex.Array, old_values_BC: chex.Array, returns_BC: chex.Array, *, cliprange: float
) -> chex.Array:
    """½ max( (V − R)², (clip(V, V_old − ε, V_old + ε) − R)² )                               [B, C], to be aggregated

    The critic may not move further than ε from the values that gave the advantages. PPO as published by its authors in
    code (openai/baselines, ppo2); ε between 0.2 and 0.5, in units of the return.
    """
    chex.assert_equal_shape([values_BC, old_values_BC, returns_BC])
    values_BC, old_values_BC, returns_BC = (
        masked.at_least_float32(values_BC),
        masked.at_least_float32(old_values_BC),
        masked.at_least_float32(returns_BC),
    )
    clipped_BC = jnp.clip(values_BC, old_values_BC - cliprange, old_values_BC + cliprange)
    return jnp.maximum(jnp.square(values_BC - returns_BC), jnp.square(clipped_BC - returns_BC)) / 2
