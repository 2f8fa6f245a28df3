"""From hidden states to log-probs of given tokens, without an array of [B, T, V]: some columns at a time, forward and backward."""

import chex
import jax
import jax.numpy as jnp

from gspo.model.distribution import Sampling, entropy, log_prob, shape_logits
from gspo.sharding import Layout, gather_axes


def token_scores(
    hidden_BCD: chex.Array,
    target_BC: chex.Array,
    kernel_DV: chex.Array,
    *,
    sampling: Sampling,
    chunk: int,
    layout: Layout | None = None,
) -> tuple[chex.Array, chex.Array]:
    """(log-probs, entropies) of the distribution that is sampled, float32 [B, C]; `chunk` columns of logits exist at a time (remat).

    On a mesh each device scores its own rows: the kernel is gathered once, and its gradient summed over the chunks before it is
    scattered. Left to the partitioner, both happen in every chunk. The vocabulary may be cut along `tensor`.
    """
    if layout is None or layout.mesh.size == 1:
        return _on_rows(hidden_BCD, target_BC, kernel_DV, sampling, chunk)
    rows, embed = layout.axes("rows"), layout.axes("embed")
    if not rows:  # `tensor` alone: the partitioner cuts the vocabulary
        return _on_rows(hidden_BCD, target_BC, kernel_DV, sampling, chunk)

    def one_device(hidden_BCD, target_BC, kernel_DV):
        return _on_rows(hidden_BCD, target_BC, gather_axes(kernel_DV, embed, 0), sampling, chunk)

    # Manual along all axes unless `tensor` has to stay with the partitioner: a mix makes XLA's CPU backend abort on bfloat16 gradients.
    manual = set(rows) if layout.axes("vocab") else set(layout.mesh.axis_names)
    spec = jax.sharding.PartitionSpec
    return jax.shard_map(
        one_device, mesh=layout.mesh, in_specs=(spec(rows), spec(rows), spec(embed or None)), out_specs=spec(rows),
        axis_names=manual, check_vma=False,
    )(hidden_BCD, target_BC, kernel_DV)  # fmt: skip


def _on_rows(hidden_BCD, target_BC, kernel_DV, sampling: Sampling, chunk: int):
    B, C = target_BC.shape

    @jax.checkpoint
    def score_chunk(hidden_BcD, target_Bc):
        logits_BcV = jnp.matmul(hidden_BcD, kernel_DV, preferred_element_type=jnp.float32)
        logits_BcV = shape_logits(logits_BcV, sampling, keep=target_Bc)
        return log_prob(logits_BcV, target_Bc), entropy(logits_BcV)

    if chunk >= C:
        return score_chunk(hidden_BCD, target_BC)
    pieces = -(-C // chunk)
    pad = pieces * chunk - C

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, pieces, chunk, *x.shape[2:]), 1, 0)

    _, scored = jax.lax.scan(lambda _, xs: (None, score_chunk(*xs)), None, (cut(hidden_BCD), cut(target_BC)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, pieces * chunk)[:, :C] for x in scored)
