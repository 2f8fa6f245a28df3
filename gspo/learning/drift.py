"""Router metrics of an update: how far the free choices are from the rollout's, the load of experts, the margins.

Measured on the routers' free choices, also under replay, where the experts that run have not moved by construction.
"""

import chex
import jax.numpy as jnp

from gspo.learning.scores import Scores
from gspo.masked import Last, Mean, Metrics, masked_mean, over_updates
from gspo.model.routing import by_layer, changed, experts_changed, load_by_layer, recorded, variance_share
from gspo.types import Batch

# A distance from the policy that sampled: a rollout's line has it after all but one of its updates (the last
# minibatch), and under the name `..._per_update` after one (the second minibatch).
DISTANCES = ("routing/experts_changed", "routing/tokens_changed")


def router_metrics(num_experts: int, scores: Scores, batch: Batch) -> Metrics:
    """Drift of the free choices from the rollout's, expert load and margins, over the real tokens of the batch, whole
    and by layer. Of values by layer a rollout has those of its last update. And the losses of the routers, before their
    weights, where they are trained on."""
    T, C = batch.tokens_BT.shape[1], batch.inputs.mask_BC.shape[1]
    P, column_T = T - C, jnp.arange(T)
    real_BT = (column_T >= (P - batch.prompt_lengths_B)[:, None]) & (
        column_T < (P + batch.completion_lengths_B)[:, None]
    )
    variation_L, peak_L = load_by_layer(scores.free_routes_LBTX, real_BT, num_experts)
    margin_L = by_layer(scores.margin_LBT, real_BT)
    metrics = {
        "routing/load_cv": over_updates(jnp.mean(variation_L)),
        "routing/load_cv_by_layer": Last(variation_L),
        "routing/load_max_over_mean": over_updates(jnp.mean(peak_L)),
        "routing/load_max_over_mean_by_layer": Last(peak_L),
        "routing/margin": _over_tokens(margin_L, real_BT),
        "routing/margin_by_layer": Last(margin_L),
    }
    if batch.old_routes_LBTX is not None:
        share, tokens = experts_changed(batch.old_routes_LBTX, scores.free_routes_LBTX, real_BT)
        known_BT = real_BT & recorded(batch.old_routes_LBTX)
        changed_LBT = changed(batch.old_routes_LBTX, scores.free_routes_LBTX)
        moved_BC = (jnp.any(changed_LBT > 0, axis=0) & known_BT)[:, P - 1 : T - 1]  # where a token is predicted
        log_ratio_BC = scores.logp_BC - batch.inputs.old_logp_BC
        metrics |= {
            "routing/experts_changed": Last(share.value),
            "routing/experts_changed_by_layer": Last(by_layer(changed_LBT, known_BT)),
            "routing/tokens_changed": Last(tokens.value),
            "routing/variance_share": over_updates(variance_share(log_ratio_BC, moved_BC, batch.inputs.mask_BC)),
        }
    if scores.router_kl_LBT is not None:
        kl_L = by_layer(scores.router_kl_LBT, real_BT)
        metrics |= {"routing/kl": _over_tokens(kl_L, real_BT), "routing/kl_by_layer": Last(kl_L)}
    if scores.balance_B is not None:
        rows_B = jnp.any(batch.inputs.mask_BC, axis=1)
        metrics["routing/balance_loss"] = masked_mean(scores.balance_B, rows_B)
        metrics["routing/z_loss"] = masked_mean(scores.z_loss_B, rows_B)
    return metrics


def _over_tokens(mean_L: chex.Array, mask_BT: chex.Array) -> Mean:
    """Means by layer over these tokens -> their mean over layers, weighted by the tokens."""
    tokens = jnp.sum(mask_BT, dtype=mean_L.dtype)
    return Mean(jnp.mean(mean_L) * tokens, tokens)
