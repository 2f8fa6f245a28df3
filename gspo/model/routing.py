"""Router logits -> chosen experts and gates; the same function replays given choices; and how far routers drift.

Routing replay: the given indices fix WHICH experts run, the gates always come from the CURRENT logits,

    g_j = exp(z_j) / Σ_{k chosen} exp(z_k)     (renormalised; else the full softmax at the chosen indices)

so the gradient reaches router and experts alike. -1 in a token's given routes means "not recorded": that token routes freely.
R2 replays what the learner's own pass over the rollout chose, R3 what the sampler chose (arXiv 2510.11370, 2512.01374).
"""

import chex
import jax
import jax.numpy as jnp

from gspo.masked import Mean, masked_mean


def top_k_experts(logits_ME: chex.Array, k: int) -> chex.Array:
    """Indices [M, X] int32 of the k largest logits, in falling order; ties go to the lower index."""
    return jax.lax.top_k(logits_ME, k)[1].astype(jnp.int32)


def route(
    logits_ME: chex.Array, k: int, *, renormalise: bool, given_MX: chex.Array | None = None
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Chooses k experts per token.

    logits_ME: float32. given_MX: int, any width of integer; a token with a negative entry routes freely.
    Returns (gates_MX float32, used_MX int32, free_MX int32): `used` are the experts that run, `free` those the router would choose
    now. Without given routes the two are the same.
    """
    chex.assert_rank(logits_ME, 2)
    chex.assert_type(logits_ME, jnp.float32)
    free_MX = top_k_experts(jax.lax.stop_gradient(logits_ME), k)
    used_MX = free_MX
    if given_MX is not None:
        chex.assert_shape(given_MX, free_MX.shape)
        recorded_M1 = jnp.all(given_MX >= 0, axis=-1, keepdims=True)
        used_MX = jnp.where(recorded_M1, given_MX.astype(jnp.int32), free_MX)
    chosen_MX = jnp.take_along_axis(logits_ME, used_MX, axis=-1)
    if renormalise:
        return jax.nn.softmax(chosen_MX, axis=-1), used_MX, free_MX
    return jnp.exp(chosen_MX - jax.nn.logsumexp(logits_ME, axis=-1, keepdims=True)), used_MX, free_MX


def route_dtype(num_experts: int) -> jnp.dtype:
    """The smallest signed integer type that holds every expert index and -1."""
    return jnp.int8 if num_experts <= 128 else jnp.int16


def experts_changed(old_LBTX: chex.Array, new_LBTX: chex.Array, mask_BT: chex.Array) -> tuple[Mean, Mean]:
    """Share of chosen experts that changed, 1 - |old ∩ new| / X, over the masked tokens of all layers; and share of tokens with a
    change in any layer. Choices are compared as sets, and a token with a -1 in `old` is not counted.
    """
    chex.assert_equal_shape([old_LBTX, new_LBTX])
    recorded_BT = mask_BT & jnp.all(old_LBTX >= 0, axis=(0, 3))
    kept_LBTX = jnp.any(old_LBTX[..., :, None] == new_LBTX.astype(old_LBTX.dtype)[..., None, :], axis=-1)
    changed_LBT = 1.0 - jnp.mean(kept_LBTX, axis=-1, dtype=jnp.float32)
    any_layer_BT = jnp.any(changed_LBT > 0, axis=0)
    return masked_mean(changed_LBT, recorded_BT[None]), masked_mean(any_layer_BT, recorded_BT)


def load_imbalance(routes_LBTX: chex.Array, mask_BT: chex.Array, num_experts: int) -> tuple[chex.Array, chex.Array]:
    """Expert load over the masked tokens: (coefficient of variation, max/mean - 1), each averaged over layers."""
    ids_E = jnp.arange(num_experts, dtype=routes_LBTX.dtype)
    hits_LBTXE = (routes_LBTX[..., None] == ids_E) & mask_BT[None, :, :, None, None]
    load_LE = jnp.sum(hits_LBTXE, axis=(1, 2, 3), dtype=jnp.float32)
    mean_L = jnp.maximum(jnp.mean(load_LE, axis=1), 1e-9)
    return jnp.mean(jnp.std(load_LE, axis=1) / mean_L), jnp.mean(jnp.max(load_LE, axis=1) / mean_L - 1.0)
