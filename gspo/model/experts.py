"""The experts of one device, on the tokens of one device: interchangeable backends with the same numbers.

All compute y_m = Σ_{x} gate_mx · E_{expert_mx}(h_m) with E(h) = (silu(h W_gate) ∘ (h W_up)) W_down, and all are
dropless. A choice outside of 0 .. E - 1 belongs to another device and adds nothing (`gspo.model.dispatch`):

    dense    every expert on every token, then a weighted sum: wasteful, obvious, the oracle of the others
    blocked  tokens sorted by expert, each group padded to whole blocks, one batched matmul over blocks
    looped   the same blocks one after the other, only those that hold tokens, and no copy of the weights for each
    ragged   tokens sorted by expert, `jax.lax.ragged_dot`
    tokamax  the same by the kernels of tokamax (an optional package, NVIDIA GPUs)
    auto     one of them, by platform and sizes: `chosen_backend`
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gspo.types import UserError


def _swiglu(gate, up):
    return jax.nn.silu(gate) * up


def dense_experts(h_MD, gates_MX, experts_MX, w_gate_EDF, w_up_EDF, w_down_EFD):
    """Every expert on every token. Returns [M, D]."""
    num_experts = w_gate_EDF.shape[0]
    weight_ME = jnp.sum(jax.nn.one_hot(experts_MX, num_experts, dtype=gates_MX.dtype) * gates_MX[..., None], axis=1)
    hidden_EMF = _swiglu(jnp.einsum("MD,EDF->EMF", h_MD, w_gate_EDF), jnp.einsum("MD,EDF->EMF", h_MD, w_up_EDF))
    out_EMD = jnp.einsum("EMF,EFD->EMD", hidden_EMF, w_down_EFD)
    return jnp.einsum("EMD,ME->MD", out_EMD, weight_ME.astype(out_EMD.dtype))


# A slot is one row of the buffer that the experts read; slot_MX says where each (token, choice) pair lies in it (at or
# past its end: nowhere), and token_S which token a slot holds (M for an empty one). Both directions are gathers, and
# each is the other's transpose: written as custom gradients, they spare XLA two scatter-adds, which are slow on every
# backend.


def _rows(x_AD, index):
    """x[index], and 0 where the index lies outside."""
    return jnp.take(x_AD, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def to_slots(h_MD, slot_MX, token_S):
    return _rows(h_MD, token_S)


def _to_slots_bwd(slot_MX, grad_SD):
    return jnp.sum(_rows(grad_SD, slot_MX), axis=1), None, None


to_slots.defvjp(lambda h, slot, token: (to_slots(h, slot, token), slot), _to_slots_bwd)


@jax.custom_vjp
def from_slots(out_SD, gates_MX, slot_MX, token_S, choice_S):
    return jnp.einsum("MXD,MX->MD", _rows(out_SD, slot_MX), gates_MX)


def _from_slots_fwd(out_SD, gates_MX, slot_MX, token_S, choice_S):
    return from_slots(out_SD, gates_MX, slot_MX, token_S, choice_S), (out_SD, gates_MX, slot_MX, token_S, choice_S)


def _from_slots_bwd(saved, grad_MD):
    out_SD, gates_MX, slot_MX, token_S, choice_S = saved
    gate_S = gates_MX.at[token_S, choice_S].get(mode="fill", fill_value=0)
    grad_out_SD = _rows(grad_MD, token_S) * gate_S[:, None]
    grad_gates_MX = jnp.einsum("MXD,MD->MX", _rows(out_SD, slot_MX), grad_MD)
    return grad_out_SD, grad_gates_MX, None, None, None


from_slots.defvjp(_from_slots_fwd, _from_slots_bwd)


class Slots(NamedTuple):
    """Where every pair lies. slot_MX int32; token_S, choice_S: the pair in each slot (M and 0 for empty slots); size_E:
    pairs of each expert; start_E: first slot of each expert's stretch.
    """

    slot_MX: chex.Array
    token_S: chex.Array
    choice_S: chex.Array
    size_E: chex.Array
    start_E: chex.Array


def make_slots(experts_MX, num_experts: int, block: int, num_slots: int) -> Slots:
    """Places each pair in its expert's stretch of the buffer, in token order; a stretch starts at a multiple of
    `block`. Pairs of experts outside of 0 .. num_experts - 1 get no slot.
    """
    M, X = experts_MX.shape
    pair_P, expert_P = jnp.arange(M * X, dtype=jnp.int32), experts_MX.reshape(-1).astype(jnp.int32)
    seen_PE = _counted(expert_P[:, None] == jnp.arange(num_experts))
    size_E = seen_PE[-1]
    padded_E = -(-size_E // block) * block
    start_E = jnp.cumsum(padded_E) - padded_E
    own_P = jnp.clip(expert_P, 0, num_experts - 1)
    slot_P = start_E[own_P] + jnp.take_along_axis(seen_PE, own_P[:, None], axis=1)[:, 0] - 1
    slot_P = jnp.where(own_P == expert_P, slot_P, num_slots + pair_P)
    pair_S = jnp.full((num_slots,), M * X, jnp.int32).at[slot_P].set(pair_P, unique_indices=True, mode="drop")
    return Slots(slot_P.reshape(M, X), pair_S // X, pair_S % X, size_E, start_E)


def _counted(hot_PE, chunk: int = 64):
    """[P, E] bool -> int32, how many are True in a column down to each row. A cumulative sum, by products with a
    triangle of ones: XLA's own goes log P times over the array (4 times slower at 4,352 x 64 on a CPU)."""
    P, E = hot_PE.shape
    chunks = -(-P // chunk)
    hot_ZcE = jnp.pad(hot_PE, ((0, chunks * chunk - P), (0, 0))).reshape(chunks, chunk, E).astype(jnp.float32)
    within_ZcE = jnp.einsum("ij,ZjE->ZiE", jnp.tril(jnp.ones((chunk, chunk), jnp.float32)), hot_ZcE).astype(jnp.int32)
    sum_ZE = within_ZcE[:, -1]
    before_ZE = jnp.cumsum(sum_ZE, axis=0) - sum_ZE
    return (within_ZcE + before_ZE[:, None]).reshape(chunks * chunk, E)[:P]


def most_pairs(experts_MX, num_experts: int) -> int:
    """The largest number of pairs that can fall on these experts: a token chooses an expert once."""
    M, X = experts_MX.shape
    return M * min(X, num_experts)


def block_size(pairs: int, num_experts: int) -> int:
    """Rows per block: about half an average group, a power of two in 8..128. Small blocks pad less, large ones multiply
    faster."""
    return int(np.clip(2 ** int(np.log2(max(pairs / num_experts / 2, 1))), 8, 128))


class Blocks(NamedTuple):
    """Slots cut into blocks of one expert each. expert_Z: whose they are; filled: how many hold tokens, the first
    ones."""

    slots: Slots
    size: int
    expert_Z: chex.Array
    filled: chex.Array


def make_blocks(experts_MX, num_experts: int, block: int | None) -> Blocks:
    """Room for the worst case: every expert's stretch may end in a block that is not full."""
    pairs = most_pairs(experts_MX, num_experts)
    block = block or block_size(pairs, num_experts)
    num_blocks = pairs // block + min(num_experts, pairs)
    slots = make_slots(experts_MX, num_experts, block, num_blocks * block)
    first_row_Z = jnp.arange(num_blocks) * block  # Z: blocks
    expert_Z = jnp.sum(first_row_Z[:, None] >= slots.start_E[None, :], axis=1) - 1
    return Blocks(slots, block, expert_Z, jnp.sum(-(-slots.size_E // block)))


def blocked_experts(h_MD, gates_MX, experts_MX, w_gate_EDF, w_up_EDF, w_down_EFD, *, block: int | None = None):
    """Batched matmul over blocks of `block` rows, each block of one expert. Returns [M, D]."""
    slots, size, expert_Z, _ = make_blocks(experts_MX, w_gate_EDF.shape[0], block)
    h_ZbD = to_slots(h_MD, slots.slot_MX, slots.token_S).reshape(len(expert_Z), size, -1)
    hidden_ZbF = _swiglu(h_ZbD @ w_gate_EDF[expert_Z], h_ZbD @ w_up_EDF[expert_Z])
    out_SD = (hidden_ZbF @ w_down_EFD[expert_Z]).reshape(len(expert_Z) * size, -1)
    return from_slots(out_SD, gates_MX.astype(out_SD.dtype), *slots[:3])


def looped_experts(h_MD, gates_MX, experts_MX, w_gate_EDF, w_up_EDF, w_down_EFD, *, block: int | None = None):
    """A loop over the blocks that hold tokens. Returns [M, D]."""
    num_experts = w_gate_EDF.shape[0]
    block = block or min(block_size(most_pairs(experts_MX, num_experts), num_experts), 64)  # larger ones gain nothing
    slots, size, expert_Z, filled = make_blocks(experts_MX, num_experts, block)
    h_SD = to_slots(h_MD, slots.slot_MX, slots.token_S)
    out_SD = _loop(size, h_SD, w_gate_EDF, w_up_EDF, w_down_EFD, expert_Z, filled)
    return from_slots(out_SD, gates_MX.astype(out_SD.dtype), *slots[:3])


# The number of rounds is known only when it runs, so that the loop's gradient is written out: another loop, in which
# each block adds to the gradient of its expert's weights.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(block: int, h_SD, w_gate_EDF, w_up_EDF, w_down_EFD, expert_Z, filled):
    return _loop_fwd(block, h_SD, w_gate_EDF, w_up_EDF, w_down_EFD, expert_Z, filled)[0]


def _of(x, i):
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _loop_fwd(block, h_SD, w_gate_EDF, w_up_EDF, w_down_EFD, expert_Z, filled):
    (S, D), F, dtype = h_SD.shape, w_gate_EDF.shape[2], h_SD.dtype

    def body(z, carry):
        out_SD, gate_SF, up_SF = carry
        row, e = z * block, expert_Z[z]
        h_bD = jax.lax.dynamic_slice_in_dim(h_SD, row, block)
        gate_bF, up_bF = h_bD @ _of(w_gate_EDF, e), h_bD @ _of(w_up_EDF, e)
        parts = (_swiglu(gate_bF, up_bF) @ _of(w_down_EFD, e), gate_bF, up_bF)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, row, 0)
            for whole, part in zip((out_SD, gate_SF, up_SF), parts, strict=True)
        )

    empty = jnp.zeros((S, D), dtype), jnp.zeros((S, F), dtype), jnp.zeros((S, F), dtype)
    out_SD, gate_SF, up_SF = jax.lax.fori_loop(0, filled, body, empty)
    return out_SD, (h_SD, gate_SF, up_SF, w_gate_EDF, w_up_EDF, w_down_EFD, expert_Z, filled)


def _loop_bwd(block, saved, grad_out_SD):
    h_SD, gate_SF, up_SF, w_gate_EDF, w_up_EDF, w_down_EFD, expert_Z, filled = saved

    def body(z, carry):
        grad_h_SD, *grads = carry
        row, e = z * block, expert_Z[z]
        h_bD, gate_bF, up_bF, grad_out_bD = (
            jax.lax.dynamic_slice_in_dim(x, row, block) for x in (h_SD, gate_SF, up_SF, grad_out_SD)
        )
        hidden_bF, back = jax.vjp(_swiglu, gate_bF, up_bF)
        grad_gate_bF, grad_up_bF = back(grad_out_bD @ _of(w_down_EFD, e).T)
        grad_h_bD = grad_gate_bF @ _of(w_gate_EDF, e).T + grad_up_bF @ _of(w_up_EDF, e).T
        products = (h_bD.T @ grad_gate_bF, h_bD.T @ grad_up_bF, hidden_bF.T @ grad_out_bD)
        return (
            jax.lax.dynamic_update_slice_in_dim(grad_h_SD, grad_h_bD, row, 0),
            *(
                jax.lax.dynamic_update_index_in_dim(grad, _of(grad, e) + product, e, 0)
                for grad, product in zip(grads, products, strict=True)
            ),
        )

    empty = jax.tree.map(jnp.zeros_like, (h_SD, w_gate_EDF, w_up_EDF, w_down_EFD))
    return *jax.lax.fori_loop(0, filled, body, empty), None, None


_loop.defvjp(_loop_fwd, _loop_bwd)


def ragged_experts(
    h_MD, gates_MX, experts_MX, w_gate_EDF, w_up_EDF, w_down_EFD, *, product: Callable = jax.lax.ragged_dot
):
    """Grouped matmul over groups of unequal length, no padding. Returns [M, D]. product: `jax.lax.ragged_dot`, or what
    is called as it is."""
    num_experts = w_gate_EDF.shape[0]
    pairs = most_pairs(experts_MX, num_experts)
    slots = make_slots(experts_MX, num_experts, 1, pairs)
    filled_S1 = (jnp.arange(pairs) < jnp.sum(slots.size_E))[:, None]

    def grouped(x_SA, w_EAB):
        # A kernel need not write the rows past the last group: what lies there may be NaN.
        return jnp.where(filled_S1, product(x_SA, w_EAB, slots.size_E), 0)

    h_SD = to_slots(h_MD, slots.slot_MX, slots.token_S)
    out_SD = grouped(_swiglu(grouped(h_SD, w_gate_EDF), grouped(h_SD, w_up_EDF)), w_down_EFD)
    return from_slots(out_SD, gates_MX.astype(out_SD.dtype), *slots[:3])


def tokamax_experts(h_MD, gates_MX, experts_MX, w_gate_EDF, w_up_EDF, w_down_EFD):
    """`ragged_experts` by tokamax. Raises UserError where it is not installed."""
    try:
        import tokamax
    except ImportError:
        raise UserError(
            "model.moe_backend='tokamax': the package is not installed; pip install tokamax (Python 3.12, jax 0.11), "
            "or leave it to 'auto'"
        ) from None
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    return ragged_experts(h_MD, gates_MX, experts_MX, *weights, product=tokamax.ragged_dot)


def chosen_backend(pairs: int, num_experts: int, d_model: int, d_expert: int, platform: str | None = None) -> str:
    """What "auto" stands for on a device whose experts get so many (token, choice) pairs. platform: jax's name of it;
    None: the default one.

    On a CPU a round of the loop costs about as much as 2 MFLOP: larger ones are looped (measured on two cores, forward
    and backward: 0.63 to 0.9 of the time of `blocked` with blocks of 64 rows and matrices of 128 x 128 or more, 1.25 at
    64 x 16). TPUs have a kernel for ragged_dot; NVIDIA GPUs one in tokamax, and without it plain batched products are
    the safe choice (not measured)."""
    platform = platform or jax.default_backend()
    if platform == "tpu":
        return "ragged"
    if platform != "cpu":
        return "tokamax" if importlib.util.find_spec("tokamax") else "blocked"
    large = block_size(pairs, num_experts) * d_model * d_expert >= LOOPED_FROM
    return "looped" if large else "blocked"


LOOPED_FROM = 64 * 128 * 128  # multiply-adds of a block's product


def auto_experts(h_MD, gates_MX, experts_MX, w_gate_EDF, w_up_EDF, w_down_EFD):
    """That of `chosen_backend`."""
    num_experts, d_model, d_expert = w_gate_EDF.shape
    name = chosen_backend(most_pairs(experts_MX, num_experts), num_experts, d_model, d_expert)
    return BACKENDS[name](h_MD, gates_MX, experts_MX, w_gate_EDF, w_up_EDF, w_down_EFD)


BACKENDS = {
    "auto": auto_experts,
    "dense": dense_experts,
    "blocked": blocked_experts,
    "looped": looped_experts,
    "ragged": ragged_experts,
    "tokamax": tokamax_experts,
}
