"""Rollouts: prefill each prompt once, share its cache among the completions of the group, decode in a while_loop.

The loop runs over columns of the frame (`gspo.types`). Every row writes the same column at the same time, so the cache
grows by one slice per step, and the loop ends when all rows have ended: its length is that of the longest completion,
not the maximum."""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from gspo.learning.decoded import DecodeState, Decoding, append, cache_widths, empty_state, rollout_of
from gspo.learning.refill import check_slots, sample_in_slots
from gspo.model.distribution import Sampling
from gspo.model.layers import layers_of
from gspo.model.transformer import Transformer
from gspo.types import Params, Rollout

FLOAT32 = ("router", "scale", "bias")  # names of parameters that are used in float32 whatever the compute dtype


def in_compute_dtype(params: Params, dtype: jnp.dtype) -> Params:
    """Parameters in the dtype of the matmuls that read them: the numbers of the sampler stay the same, bit by bit, and
    the decode loop reads half the bytes for each token."""

    def one(path, x):
        return x if path[-1].key in FLOAT32 else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def make_sampler(
    model: Transformer,
    *,
    num_generations: int,
    max_completion_length: int,
    eos_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    max_num_seqs: int = 0,
) -> Callable[[Params, chex.Array, chex.Array, chex.PRNGKey], Rollout]:
    """Returns jitted `sample(params, prompt_QP, prompt_lengths_Q, key) -> Rollout` with B = Q · num_generations rows.

    prompt_QP: int32, left-padded. Rows 0 .. G-1 of the result belong to prompt 0, and so on. A row ends with any of
    eos_ids (its log-prob counts) or after max_completion_length tokens; the rest of its frame is pad_id, and -1 in
    routes. Tokens are drawn from the distribution that `sampling` cuts, log-probs are those of the uncut softmax. Token
    i of row b is drawn with fold_in(fold_in(key, b), i). Compiled once per prompt width P. On a mesh
    (`model.layout`) rows are cut as the layout says. max_num_seqs: rows that are decoded at a time, where they are
    fewer than B (`gspo.learning.refill`); 0: all.

    Raises UserError where max_num_seqs does not go with the layout, or with an injected mismatch: its noise is drawn
    for all rows of a step together."""
    spec, C, G = model.spec, max_completion_length, num_generations
    how = Decoding(model, G, C, tuple(eos_ids), pad_id, sampling)
    check_slots(max_num_seqs, model.layout)
    on_mesh = model.layout.constrain_fields

    def forward(params, key, step, method, *args):
        """The model, with a stream of router noise of its own at every step where a mismatch is injected."""
        rngs = {"router": jax.random.fold_in(jax.random.fold_in(key, C), step)} if model.injects else None
        return model.apply({"params": params}, *args, method=method, rngs=rngs)

    def sample(params, prompt_QP, prompt_lengths_Q, key) -> Rollout:
        Q, P = prompt_QP.shape
        B = Q * G
        chex.assert_shape(prompt_lengths_Q, (Q,))
        if 0 < max_num_seqs < B:
            return sample_in_slots(how, max_num_seqs, params, prompt_QP, prompt_lengths_Q, key)
        widths = cache_widths(C)

        # Prefill: one pass over the prompts. Their keys and values serve all completions.
        first_Q = P - prompt_lengths_Q
        out, caches = forward(params, key, 0, "prefill", prompt_QP, first_Q, G, widths[0])
        first_B = jnp.repeat(first_Q, G)
        state = on_mesh(empty_state(spec, out, caches, B, C, pad_id))
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
        last_BD = jnp.repeat(out.hidden_BTD[:, -1], G, axis=0)
        state = append(how, state, *how.next_token(params, key_B, last_BD, state.step))

        # Decode: feed the last token, draw the next.
        layers = None if spec.scanned else layers_of(params, spec)  # cut once, not for each token
        seen_QP = jnp.arange(P) >= first_Q[:, None]

        def body(state: DecodeState) -> DecodeState:
            column = state.step - 1
            last_B = jax.lax.dynamic_index_in_dim(state.tokens_BC, column, axis=1, keepdims=False)
            seen_1C = (jnp.arange(state.caches[0].width) <= column)[None]
            args = (last_B, P + column - first_B, seen_QP, seen_1C, state.caches, column, layers)
            out, caches = forward(params, key, state.step, "decode", *args)
            routes_LBTX = state.routes_LBTX
            if routes_LBTX is not None:
                routes_LBTX = jax.lax.dynamic_update_slice(routes_LBTX, out.free_routes_LBTX, (0, 0, P + column, 0))
            state = state.replace(caches=caches, routes_LBTX=routes_LBTX)
            drawn = how.next_token(params, key_B, out.hidden_BTD[:, 0], state.step)
            return on_mesh(append(how, state, *drawn))

        for width in widths:
            state = state.replace(caches=tuple(cache.widened(width) for cache in state.caches))
            last = min(width + 1, C)  # tokens drawn when the cache is full
            state = jax.lax.while_loop(lambda s, last=last: (s.step < last) & ~jnp.all(s.ended_B), body, state)

        return on_mesh(rollout_of(state, prompt_QP, prompt_lengths_Q, first_B))

    return jax.jit(jax.named_scope("rollout")(sample))
