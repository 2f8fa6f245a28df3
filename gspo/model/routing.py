"""Router logits -> chosen experts and gates; the same function replays given choices; and how far routers drift.

Routing replay: the given indices fix WHICH experts run, the gates always come from the CURRENT logits,

    g_j = exp(z_j) / Σ_{k chosen} exp(z_k)     (renormalised; else the full softmax at the chosen indices)

so the gradient reaches router and experts alike. -1 in a token's given routes means "not recorded": that token routes
freely. R2 replays what the learner's own pass over the rollout chose, R3 what the sampler chose (arXiv 2510.11370,
2512.01374).

A sigmoid router (DeepSeek-V3, 2412.19437) scores each expert by itself, σ(z), and chooses by score and a bias that no
gradient reaches. Its "logits" are log σ(z), here and in all that comes after: their softmax is the score normalised
over the experts, σ(z_e) / Σ σ(z), so that renormalised gates, balance loss, drift and log-probs of routers are one
formula for both kinds."""

import chex
import jax
import jax.numpy as jnp

from gspo.masked import Mean, masked_mean


def largest(logits: chex.Array, k: int) -> tuple[chex.Array, chex.Array]:
    """The k largest of [..., E], in falling order, and their indices, [..., k] int32; ties go to the lower index.

    By k passes of plain maxima: `jax.lax.top_k` is a call that the partitioner cannot cut by rows on every backend, and
    all rows would be gathered for it."""
    E, rest, values, indices = logits.shape[-1], logits, [], []
    for _ in range(k):
        value = jnp.max(rest, axis=-1, keepdims=True)
        index = jnp.min(jnp.where(rest == value, jnp.arange(E), E - 1), axis=-1, keepdims=True)
        rest = jnp.where(jnp.arange(E) == index, -jnp.inf, rest)
        values.append(value)
        indices.append(index.astype(jnp.int32))
    return jnp.concatenate(values, axis=-1), jnp.concatenate(indices, axis=-1)


def top_k_experts(logits_ME: chex.Array, k: int) -> chex.Array:
    """Indices [M, X] int32 of the k largest logits, in falling order; ties go to the lower index, 0 and -0 tie."""
    return largest(logits_ME, k)[1]


def compared(logits: chex.Array, bias: chex.Array | None = None) -> chex.Array:
    """[..., E] what a router compares when it chooses: its logits, or the scores of a sigmoid router with their bias,
    which broadcasts."""
    return logits if bias is None else jnp.exp(logits) + bias


def route(
    logits_ME: chex.Array,
    k: int,
    *,
    renormalise: bool,
    given_MX: chex.Array | None = None,
    bias_E: chex.Array | None = None,
    scale: float = 1.0,
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Chooses k experts per token.

    logits_ME: float32. given_MX: int, any width of integer; a token with a negative entry routes freely. bias_E: of a
    sigmoid router, whose gates are its scores at the chosen experts, renormalised or not. scale: of all gates. Returns
    (gates_MX float32, used_MX int32, free_MX int32): `used` are the experts that run, `free` those the router would
    choose now. Without given routes the two are the same.
    """
    chex.assert_rank(logits_ME, 2)
    chex.assert_type(logits_ME, jnp.float32)
    free_MX = top_k_experts(jax.lax.stop_gradient(compared(logits_ME, bias_E)), k)
    used_MX = free_MX
    if given_MX is not None:
        chex.assert_shape(given_MX, free_MX.shape)
        recorded_M1 = jnp.all(given_MX >= 0, axis=-1, keepdims=True)
        used_MX = jnp.where(recorded_M1, given_MX.astype(jnp.int32), free_MX)
    chosen_MX = jnp.take_along_axis(logits_ME, used_MX, axis=-1)
    if renormalise:
        gates_MX = jax.nn.softmax(chosen_MX, axis=-1)
    elif bias_E is not None:
        gates_MX = jnp.exp(chosen_MX)
    else:
        gates_MX = jnp.exp(chosen_MX - jax.nn.logsumexp(logits_ME, axis=-1, keepdims=True))
    return gates_MX if scale == 1 else scale * gates_MX, used_MX, free_MX


def swap_experts(key: chex.PRNGKey, experts_MX: chex.Array, num_experts: int, rate: float) -> chex.Array:
    """With probability `rate`, replaces a token's last expert by one of those it did not choose, uniformly: what a
    sampler with another router would do, at a known rate. Mismatch injection; M tokens, E experts, X < E of them
    chosen.
    """
    M = experts_MX.shape[0]
    coin_key, pick_key = jax.random.split(key)
    score_ME = jax.random.uniform(pick_key, (M, num_experts))
    chosen_ME = jnp.any(experts_MX[:, :, None] == jnp.arange(num_experts), axis=1)
    other_M = jnp.argmax(jnp.where(chosen_ME, -1.0, score_ME), axis=1).astype(experts_MX.dtype)
    last_M = jnp.where(jax.random.bernoulli(coin_key, rate, (M,)), other_M, experts_MX[:, -1])
    return experts_MX.at[:, -1].set(last_M)


def route_dtype(num_experts: int) -> jnp.dtype:
    """The smallest signed integer type that holds every expert index and -1."""
    return jnp.int8 if num_experts <= 128 else jnp.int16


def changed(old_LBTX: chex.Array, new_LBTX: chex.Array) -> chex.Array:
    """[L, B, T] float32 share of chosen experts that changed, 1 - |old ∩ new| / X. Choices are compared as sets."""
    chex.assert_equal_shape([old_LBTX, new_LBTX])
    kept_LBTX = jnp.any(old_LBTX[..., :, None] == new_LBTX.astype(old_LBTX.dtype)[..., None, :], axis=-1)
    return 1.0 - jnp.mean(kept_LBTX, axis=-1, dtype=jnp.float32)


def recorded(routes_LBTX: chex.Array) -> chex.Array:
    """[B, T] bool: tokens without a -1 in any layer."""
    return jnp.all(routes_LBTX >= 0, axis=(0, 3))


def experts_changed(old_LBTX: chex.Array, new_LBTX: chex.Array, mask_BT: chex.Array) -> tuple[Mean, Mean]:
    """Share of chosen experts that changed over the masked tokens of all layers; and share of tokens with a change in
    any layer.

    A token with a -1 in `old` is not counted.
    """
    changed_LBT, mask_BT = changed(old_LBTX, new_LBTX), mask_BT & recorded(old_LBTX)
    return masked_mean(changed_LBT, mask_BT[None]), masked_mean(jnp.any(changed_LBT > 0, axis=0), mask_BT)


def by_layer(x_LBT: chex.Array, mask_BT: chex.Array) -> chex.Array:
    """[L] mean over the masked tokens of each layer."""
    return jnp.sum(jnp.where(mask_BT, x_LBT, 0.0), axis=(1, 2)) / jnp.maximum(jnp.sum(mask_BT), 1)


def router_margin(scores: chex.Array, k: int) -> chex.Array:
    """[..., E] -> [...] distance between the k-th largest of what a router compares and the next: how far a choice is
    from changing. 0 for k = E."""
    if k == scores.shape[-1]:
        return jnp.zeros(scores.shape[:-1], scores.dtype)
    found = largest(scores, k + 1)[0]
    return found[..., k - 1] - found[..., k]


def router_kl(old_logits: chex.Array, new_logits: chex.Array) -> chex.Array:
    """[..., E] -> [...] KL(p_old ‖ p_new) of the routers' softmax over all experts, in nats."""
    old_logp, new_logp = jax.nn.log_softmax(old_logits, axis=-1), jax.nn.log_softmax(new_logits, axis=-1)
    return jnp.sum(jnp.exp(old_logp) * (old_logp - new_logp), axis=-1)


def variance_share(x_BC: chex.Array, part_BC: chex.Array, mask_BC: chex.Array) -> chex.Array:
    """Share of the variance of x over the mask that sits on the elements of `part`: Σ_part (x - mean)² / Σ (x -
    mean)²."""
    squared_BC = jnp.square(x_BC - masked_mean(x_BC, mask_BC).value)
    whole = jnp.sum(jnp.where(mask_BC, squared_BC, 0.0))
    return jnp.sum(jnp.where(mask_BC & part_BC, squared_BC, 0.0)) / jnp.where(whole > 0, whole, 1.0)


def load_by_layer(routes_LBTX: chex.Array, mask_BT: chex.Array, num_experts: int) -> tuple[chex.Array, chex.Array]:
    """Expert load over the masked tokens, [L] each: coefficient of variation, and max/mean - 1."""
    ids_E = jnp.arange(num_experts, dtype=routes_LBTX.dtype)
    hits_LBTXE = (routes_LBTX[..., None] == ids_E) & mask_BT[None, :, :, None, None]
    load_LE = jnp.sum(hits_LBTXE, axis=(1, 2, 3), dtype=jnp.float32)
    mean_L = jnp.maximum(jnp.mean(load_LE, axis=1), 1e-9)
    return jnp.std(load_LE, axis=1) / mean_L, jnp.max(load_LE, axis=1) / mean_L - 1.0


def balance_loss(logits_LBTE: chex.Array, routes_LBTX: chex.Array, mask_BT: chex.Array) -> chex.Array:
    """[B] load-balance loss of each row, E Σ_e f_e P_e averaged over layers; 1 where the load is even, E where one
    expert has it all.

    f_e is the share of the row's choices that fell on expert e, P_e the mean probability that its router gave it. The
    loss of Switch Transformer (2101.03961) eq. 4, over one sequence as in DeepSeek-V3 (2412.19437) eq. 17: then it does
    not depend on which rows share a micro-batch or a device. A row with an empty mask gives 0.
    """
    E, X = logits_LBTE.shape[-1], routes_LBTX.shape[-1]
    tokens_B = jnp.maximum(jnp.sum(mask_BT, axis=1), 1)
    mask_BT1 = mask_BT[:, :, None]
    chosen_LBTE = jnp.sum(jax.nn.one_hot(routes_LBTX, E, dtype=jnp.float32), axis=-2)
    share_LBE = jnp.sum(jnp.where(mask_BT1, chosen_LBTE, 0.0), axis=2) / (X * tokens_B[:, None])
    prob_LBE = jnp.sum(jnp.where(mask_BT1, jax.nn.softmax(logits_LBTE, axis=-1), 0.0), axis=2) / tokens_B[:, None]
    return E * jnp.mean(jnp.sum(jax.lax.stop_gradient(share_LBE) * prob_LBE, axis=-1), axis=0)


def z_loss(logits_LBTE: chex.Array, mask_BT: chex.Array) -> chex.Array:
    """[B] mean over a row's tokens and over layers of (log Σ_e exp z_e)²: keeps router logits small. ST-MoE
    (2202.08906) eq. 5."""
    squared_LBT = jnp.where(mask_BT, jnp.square(jax.nn.logsumexp(logits_LBTE, axis=-1)), 0.0)
    return jnp.mean(jnp.sum(squared_LBT, axis=2) / jnp.maximum(jnp.sum(mask_BT, axis=1), 1), axis=0)
