"""Losses on preferences: pairs of completions of which one was preferred.

Rows 2 q and 2 q + 1 are the chosen and the rejected completion of pair q, as `gspo.data.preferences` deals them. Both
losses are −log σ of a difference: of two scores (Bradley-Terry, the reward model), or of two log-ratios (DPO, where the
policy is its own reward model). Counts are of pairs; gradients of `total` may be summed over micro-batches of whole
pairs.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from gspo import masked
from gspo.masked import Max, Mean, Metrics, Min
from gspo.types import LossInputs


def chosen_and_rejected(x_B: chex.Array) -> tuple[chex.Array, chex.Array]:
    """[2 Q] -> [Q], [Q]."""
    chex.assert_rank(x_B, 1)
    chex.assert_is_divisible(x_B.shape[0], 2)
    return x_B[0::2], x_B[1::2]


def _mean(x_Q: chex.Array) -> Mean:
    return masked.masked_mean(x_Q, jnp.ones(x_Q.shape, bool))


def _share_right(difference_Q: chex.Array) -> Mean:
    """How often the chosen one is ahead. A tie counts as half."""
    return _mean((jnp.sign(difference_Q) + 1) / 2)


def bradley_terry(
    scores_B: chex.Array, margins_B: chex.Array, *, center_rewards_coefficient: float = 0.0
) -> tuple[Mean, Metrics]:
    """L = 1/Q Σ_q [ −log σ( r(x, y_c) − r(x, y_r) − m ) + λ ( r(x, y_c) + r(x, y_r) )² ]

    P(y_c ≻ y_r) = σ(r_c − r_r): Bradley & Terry (1952), as the loss of a reward model InstructGPT (2203.02155) eq. 1.
    m >= 0, by how much the chosen text was rated better: Llama 2 (2307.09288) eq. 2; 0 where nothing is known. λ > 0
    keeps the scores, of which the first term fixes nothing but differences, around zero: Eisenstein et al. (2312.09244)
    eq. 2. margins_B: that of the pair, in both of its rows.

    Metrics, by TRL's names: accuracy and margin are of the scores alone, without m.
    """
    chex.assert_equal_shape([scores_B, margins_B])
    chosen_Q, rejected_Q = chosen_and_rejected(masked.at_least_float32(scores_B))
    difference_Q = chosen_Q - rejected_Q
    loss_Q = -jax.nn.log_sigmoid(difference_Q - margins_B[0::2])
    loss = ranking = _mean(loss_Q)
    if center_rewards_coefficient:
        loss = _mean(loss_Q + center_rewards_coefficient * jnp.square(chosen_Q + rejected_Q))
    metrics = {
        "loss": loss,
        "loss/ranking": ranking,
        "accuracy": _share_right(difference_Q),
        "margin": _mean(difference_Q),
        "mean_reward": _mean(scores_B),
        "min_reward": Min(jnp.min(scores_B)),
        "max_reward": Max(jnp.max(scores_B)),
    }
    return loss, jax.lax.stop_gradient(metrics)


def implicit_rewards(logp_BC: chex.Array, ref_logp_BC: chex.Array, mask_BC: chex.Array, beta: float) -> chex.Array:
    """[B] β log π_θ(y|x)/π_ref(y|x), sums over the completion: the reward that a policy stands for, but for a part that
    depends on the prompt alone. DPO (2305.18290) eq. 5."""
    chex.assert_equal_shape([logp_BC, ref_logp_BC, mask_BC])
    chex.assert_type(mask_BC, bool)
    difference_BC = masked.at_least_float32(logp_BC) - masked.at_least_float32(ref_logp_BC)
    return beta * masked.masked_sum(difference_BC, mask_BC, axis=1)


@dataclasses.dataclass(frozen=True)
class DPO:
    """The `Loss` of direct preference optimization, with r̂ = β log π_θ/π_ref (`implicit_rewards`), h = r̂_c − r̂_r:

        L = 1/Q Σ_q [ −(1 − ε) log σ(h) − ε log σ(−h) ]

    DPO (2305.18290) eq. 7 is ε = 0; ε is the rate at which labels are taken to be exchanged (its "conservative" form,
    TRL's label_smoothing). Ignores old log-probs and advantages. Metrics by TRL's names.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    needs = ("ref_logp_BC",)

    def aggregate(self, x_BC: chex.Array, mask_BC: chex.Array) -> Mean:
        """Sums over rows and their tokens, counted in pairs."""
        pairs = jnp.sum(jnp.any(mask_BC, axis=1)) / 2
        return Mean(masked.masked_sum(masked.at_least_float32(x_BC), mask_BC), pairs)

    def __call__(self, inputs: LossInputs) -> tuple[Mean, Metrics]:
        if inputs.ref_logp_BC is None:
            raise ValueError("this objective needs ref_logp_BC")
        rewards_B = implicit_rewards(inputs.logp_BC, inputs.ref_logp_BC, inputs.mask_BC, self.beta)
        chosen_Q, rejected_Q = chosen_and_rejected(rewards_B)
        h_Q, smoothing = chosen_Q - rejected_Q, self.label_smoothing
        loss_Q = -(1 - smoothing) * jax.nn.log_sigmoid(h_Q) - smoothing * jax.nn.log_sigmoid(-h_Q)
        loss = _mean(loss_Q)
        logp_B = masked.masked_sum(masked.at_least_float32(inputs.logp_BC), inputs.mask_BC, axis=1)
        chosen_logp_Q, rejected_logp_Q = chosen_and_rejected(logp_B)
        metrics = {
            "loss": loss,
            "rewards/accuracies": _share_right(h_Q),
            "rewards/margins": _mean(h_Q),
            "rewards/chosen": _mean(chosen_Q),
            "rewards/rejected": _mean(rejected_Q),
            "logps/chosen": _mean(chosen_logp_Q),
            "logps/rejected": _mean(rejected_logp_Q),
        }
        return loss, jax.lax.stop_gradient(metrics)
