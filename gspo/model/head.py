"""From hidden states to log-probs of given tokens, without an array of [B, T, V]: some columns at a time, forward and
backward."""

import chex
import jax
import jax.numpy as jnp

from gspo.model.columns import cut_columns, join_columns
from gspo.model.distribution import Sampling, entropy, log_prob, scored_logits
from gspo.parallel.sharding import ONE_DEVICE, Layout, gather_axes


def token_scores(
    hidden_BCD: chex.Array,
    target_BC: chex.Array,
    kernel_DV: chex.Array,
    *,
    sampling: Sampling,
    chunk: int,
    layout: Layout = ONE_DEVICE,
) -> tuple[chex.Array, chex.Array]:
    """(log-probs, entropies) under softmax(logits / temperature), float32 [B, C]; `chunk` columns of logits exist at a
    time (remat).

    Of `sampling` only the temperature matters: cuts shape what is drawn, never a score (`gspo.model.distribution`). So
    the entropy too is that of the uncut softmax, and nothing here sorts the vocabulary.

    On a mesh each device scores its own rows: the kernel is gathered once, and its gradient summed over the chunks
    before it is scattered. Left to the partitioner, both happen in every chunk. The vocabulary may be cut along
    `tensor`."""
    rows, embed = layout.axes("rows"), layout.axes("embed")
    if not rows:  # one device; or `tensor` alone, where the partitioner cuts the vocabulary
        return _on_rows(hidden_BCD, target_BC, kernel_DV, sampling, chunk)

    def one_device(hidden_BCD, target_BC, kernel_DV):
        return _on_rows(hidden_BCD, target_BC, gather_axes(kernel_DV, embed, 0), sampling, chunk)

    # Manual along all axes unless `tensor` has to stay with the partitioner: a mix makes XLA's CPU backend abort on
    # bfloat16 gradients.
    manual = set(rows) if layout.axes("vocab") else set(layout.mesh.axis_names)
    spec = jax.sharding.PartitionSpec
    return jax.shard_map(
        one_device, mesh=layout.mesh, in_specs=(spec(rows), spec(rows), spec(embed or None)), out_specs=spec(rows),
        axis_names=manual, check_vma=False,
    )(hidden_BCD, target_BC, kernel_DV)  # fmt: skip


def _on_rows(hidden_BCD, target_BC, kernel_DV, sampling: Sampling, chunk: int):
    C = target_BC.shape[1]

    @jax.checkpoint
    def score_chunk(hidden_BcD, target_Bc):
        logits_BcV = jnp.matmul(hidden_BcD, kernel_DV, preferred_element_type=jnp.float32)
        logits_BcV = scored_logits(logits_BcV, sampling)
        return log_prob(logits_BcV, target_Bc), entropy(logits_BcV)

    if chunk >= C:
        return score_chunk(hidden_BCD, target_BC)
    scored = jax.lax.map(lambda xs: score_chunk(*xs), (cut_columns(hidden_BCD, chunk), cut_columns(target_BC, chunk)))
    return tuple(join_columns(x, C) for x in scored)
