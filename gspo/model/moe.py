"""Mixture-of-Experts layer: one set of parameters, interchangeable ways to bring tokens to experts.

All backends compute y_m = Σ_{x} gate_mx · E_{expert_mx}(h_m) with E(h) = (silu(h W_gate) ∘ (h W_up)) W_down, and all are dropless:

    dense    every expert on every token, then a weighted sum: wasteful, obvious, the oracle of the others
    blocked  tokens sorted by expert, each group padded to whole blocks, one batched matmul over blocks: the choice on CPU
    ragged   tokens sorted by expert, `jax.lax.ragged_dot`: the choice on GPU and TPU
"""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gspo.model.attention import kernel_init
from gspo.model.routing import route, swap_experts, top_k_experts


def _swiglu(gate, up):
    return jax.nn.silu(gate) * up


def dense_experts(h_MD, gates_MX, experts_MX, w_gate_EDF, w_up_EDF, w_down_EFD):
    """Every expert on every token. Returns [M, D]."""
    num_experts = w_gate_EDF.shape[0]
    weight_ME = jnp.sum(jax.nn.one_hot(experts_MX, num_experts, dtype=gates_MX.dtype) * gates_MX[..., None], axis=1)
    hidden_EMF = _swiglu(jnp.einsum("MD,EDF->EMF", h_MD, w_gate_EDF), jnp.einsum("MD,EDF->EMF", h_MD, w_up_EDF))
    out_EMD = jnp.einsum("EMF,EFD->EMD", hidden_EMF, w_down_EFD)
    return jnp.einsum("EMD,ME->MD", out_EMD, weight_ME.astype(out_EMD.dtype))


# A slot is one row of the buffer that the experts read; slot_MX says where each (token, choice) pair lies in it, and token_S which
# token a slot holds (M for an empty one). Both directions are gathers, and each is the other's transpose: written as custom
# gradients, they spare XLA two scatter-adds, which are slow on every backend.


@jax.custom_vjp
def _to_slots(h_MD, slot_MX, token_S):
    return jnp.take(h_MD, token_S, axis=0, mode="fill", fill_value=0)


def _to_slots_bwd(slot_MX, grad_SD):
    return jnp.sum(grad_SD[slot_MX], axis=1), None, None


_to_slots.defvjp(lambda h, slot, token: (_to_slots(h, slot, token), slot), _to_slots_bwd)


@jax.custom_vjp
def _from_slots(out_SD, gates_MX, slot_MX, token_S, choice_S):
    return jnp.einsum("MXD,MX->MD", out_SD[slot_MX], gates_MX)


def _from_slots_fwd(out_SD, gates_MX, slot_MX, token_S, choice_S):
    return _from_slots(out_SD, gates_MX, slot_MX, token_S, choice_S), (out_SD, gates_MX, slot_MX, token_S, choice_S)


def _from_slots_bwd(saved, grad_MD):
    out_SD, gates_MX, slot_MX, token_S, choice_S = saved
    gate_S = gates_MX.at[token_S, choice_S].get(mode="fill", fill_value=0)
    grad_out_SD = jnp.take(grad_MD, token_S, axis=0, mode="fill", fill_value=0) * gate_S[:, None]
    grad_gates_MX = jnp.einsum("MXD,MD->MX", out_SD[slot_MX], grad_MD)
    return grad_out_SD, grad_gates_MX, None, None, None


_from_slots.defvjp(_from_slots_fwd, _from_slots_bwd)


def _slots(experts_MX, num_experts: int, block: int, num_slots: int):
    """Places each pair in its expert's stretch of the buffer, in token order; a stretch starts at a multiple of `block`.

    Returns slot_MX, token_S, choice_S (M and 0 for empty slots) and size_E, the pairs of each expert.
    """
    M, X = experts_MX.shape
    hot_PE = experts_MX.reshape(-1, 1) == jnp.arange(num_experts, dtype=experts_MX.dtype)
    seen_PE = jnp.cumsum(hot_PE, axis=0, dtype=jnp.int32)
    size_E = seen_PE[-1]
    padded_E = -(-size_E // block) * block
    start_E = jnp.cumsum(padded_E) - padded_E
    slot_P = jnp.sum(jnp.where(hot_PE, seen_PE - 1 + start_E, 0), axis=1)
    pair_S = jnp.full((num_slots,), M * X, jnp.int32).at[slot_P].set(jnp.arange(M * X, dtype=jnp.int32), unique_indices=True)
    return slot_P.reshape(M, X), pair_S // X, pair_S % X, size_E, start_E


def block_size(pairs: int, num_experts: int) -> int:
    """Rows per block: about half an average group, a power of two in 8..128. Small blocks pad less, large ones multiply faster."""
    return int(np.clip(2 ** int(np.log2(max(pairs / num_experts / 2, 1))), 8, 128))


def blocked_experts(h_MD, gates_MX, experts_MX, w_gate_EDF, w_up_EDF, w_down_EFD, *, block: int | None = None):
    """Batched matmul over blocks of `block` rows, each block of one expert. Returns [M, D]."""
    num_experts, pairs = w_gate_EDF.shape[0], experts_MX.size
    block = block or block_size(pairs, num_experts)
    num_blocks = pairs // block + min(num_experts, pairs)  # every group may end in a block that is not full
    slot_MX, token_S, choice_S, _, start_E = _slots(experts_MX, num_experts, block, num_blocks * block)
    first_row_Z = jnp.arange(num_blocks) * block  # Z: blocks
    expert_Z = jnp.sum(first_row_Z[:, None] >= start_E[None, :], axis=1) - 1
    h_ZbD = _to_slots(h_MD, slot_MX, token_S).reshape(num_blocks, block, -1)
    hidden_ZbF = _swiglu(h_ZbD @ w_gate_EDF[expert_Z], h_ZbD @ w_up_EDF[expert_Z])
    out_SD = (hidden_ZbF @ w_down_EFD[expert_Z]).reshape(num_blocks * block, -1)
    return _from_slots(out_SD, gates_MX.astype(out_SD.dtype), slot_MX, token_S, choice_S)


def ragged_experts(h_MD, gates_MX, experts_MX, w_gate_EDF, w_up_EDF, w_down_EFD):
    """Grouped matmul of XLA over groups of unequal length, no padding. Returns [M, D]."""
    slot_MX, token_S, choice_S, size_E, _ = _slots(experts_MX, w_gate_EDF.shape[0], 1, experts_MX.size)
    h_SD = _to_slots(h_MD, slot_MX, token_S)
    grouped = partial(jax.lax.ragged_dot, group_sizes=size_E)
    out_SD = grouped(_swiglu(grouped(h_SD, w_gate_EDF), grouped(h_SD, w_up_EDF)), w_down_EFD)
    return _from_slots(out_SD, gates_MX.astype(out_SD.dtype), slot_MX, token_S, choice_S)


BACKENDS = {"dense": dense_experts, "blocked": blocked_experts, "ragged": ragged_experts}


class MoE(nn.Module):
    """Router (float32) and SwiGLU experts. x_BTD, given routes [B, T, X] or None -> (y_BTD, free_BTX, router_logits_BTE float32)."""

    num_experts: int
    experts_per_token: int
    expert_width: int
    norm_topk_prob: bool
    backend: str
    dtype: jnp.dtype
    noise: float = 0.0
    swap: float = 0.0

    @nn.compact
    def __call__(self, x_BTD, given_BTX=None):
        B, T, D = x_BTD.shape
        E, F, X = self.num_experts, self.expert_width, self.experts_per_token

        def weight(name, shape, *axes):
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,)) if len(shape) == 3 else kernel_init
            return self.param(name, nn.with_partitioning(init, axes), shape, jnp.float32)

        x_MD = x_BTD.reshape(B * T, D)
        router_DE = weight("router", (D, E), "embed", None)
        # float32 whatever the compute dtype: a rounded logit can change an expert, and then the whole token changes.
        logits_ME = jnp.matmul(x_MD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
        if self.noise:  # mismatch injection: a router that is not the learner's
            logits_ME += self.noise * jax.random.normal(self.make_rng("router"), logits_ME.shape)
        given_MX = None if given_BTX is None else given_BTX.reshape(B * T, X)
        if self.swap:
            given_MX = swap_experts(self.make_rng("router"), top_k_experts(logits_ME, X), E, self.swap)
        gates_MX, used_MX, free_MX = route(logits_ME, X, renormalise=self.norm_topk_prob, given_MX=given_MX)
        if self.swap:
            free_MX = used_MX  # the swapped experts are the choice of this router
        chex.assert_shape(gates_MX, (B * T, X))
        w_gate = weight("gate", (E, D, F), "expert", "embed", "mlp").astype(self.dtype)
        w_up = weight("up", (E, D, F), "expert", "embed", "mlp").astype(self.dtype)
        w_down = weight("down", (E, F, D), "expert", "mlp", "embed").astype(self.dtype)
        y_MD = BACKENDS[self.backend](x_MD, gates_MX, used_MX, w_gate, w_up, w_down)
        return y_MD.reshape(B, T, D), free_MX.reshape(B, T, X), logits_ME.reshape(B, T, E)
