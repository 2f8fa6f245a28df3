"""Rollouts: prefill each prompt once, share its cache among the completions of the group, decode in a while_loop.

The loop runs over columns of the frame (`gspo.types`). Every row writes the same column at the same time, so the cache
grows by one slice per step, and the loop ends when all rows have ended: its length is that of the longest completion,
not the maximum."""

from collections.abc import Callable, Sequence

import chex
import flax.struct
import jax
import jax.numpy as jnp

from gspo.model.cache import Caches
from gspo.model.distribution import Sampling, draw
from gspo.model.routing import route_dtype
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Output, Transformer, layers_of
from gspo.types import Params, Rollout, array

FIRST_WIDTH = 128  # columns that the cache of completions starts with
FLOAT32 = ("router", "scale")  # names of parameters that are used in float32 whatever the compute dtype


def in_compute_dtype(params: Params, dtype: jnp.dtype) -> Params:
    """Parameters in the dtype of the matmuls that read them: the numbers of the sampler stay the same, bit by bit, and
    the decode loop reads half the bytes for each token."""

    def one(path, x):
        return x if path[-1].key in FLOAT32 else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


@flax.struct.dataclass
class DecodeState:
    """Carry of the decode loop. `step` tokens of each row are written; column P + step - 1 was not yet fed to the
    model."""

    step: chex.Array = array()  # int32 scalar
    tokens_BC: chex.Array = array("BC")  # int32
    logp_BC: chex.Array = array("BC")  # float32
    lengths_B: chex.Array = array("B")  # int32, tokens written, the end token included
    ended_B: chex.Array = array("B")  # bool
    caches: Caches
    routes_LBTX: chex.Array | None = array("LBTX")


def empty_state(spec: ModelSpec, out: Output, caches: Caches, rows: int, width: int, pad_id: int) -> DecodeState:
    """Nothing drawn yet, behind prompts that the model has read: `out`, of which the routes are kept for every row."""
    routes_LBTX = None
    if out.free_routes_LBTX is not None:
        L, Q, P, X = out.free_routes_LBTX.shape
        routes_LBTX = jnp.full((L, rows, P + width, X), -1, route_dtype(spec.num_experts))
        routes_LBTX = routes_LBTX.at[:, :, :P].set(jnp.repeat(out.free_routes_LBTX, rows // Q, axis=1))
    return DecodeState(
        step=jnp.int32(0),
        tokens_BC=jnp.full((rows, width), pad_id, jnp.int32),
        logp_BC=jnp.zeros((rows, width), jnp.float32),
        lengths_B=jnp.zeros((rows,), jnp.int32),
        ended_B=jnp.zeros((rows,), bool),
        caches=caches,
        routes_LBTX=routes_LBTX,
    )


def append(
    state: DecodeState, token_B: chex.Array, logp_B: chex.Array, eos_ids: Sequence[int], pad_id: int
) -> DecodeState:
    """Writes one token to every row that has not ended; pads the others."""
    live_B = ~state.ended_B
    at = (0, state.step)
    is_end_B = jnp.any(token_B[:, None] == jnp.asarray(eos_ids, jnp.int32), axis=1)
    return state.replace(
        step=state.step + 1,
        tokens_BC=jax.lax.dynamic_update_slice(state.tokens_BC, jnp.where(live_B, token_B, pad_id)[:, None], at),
        logp_BC=jax.lax.dynamic_update_slice(state.logp_BC, jnp.where(live_B, logp_B, 0.0)[:, None], at),
        lengths_B=state.lengths_B + live_B,
        ended_B=state.ended_B | is_end_B,
    )


def rollout_of(state: DecodeState, prompt_QP: chex.Array, prompt_lengths_Q: chex.Array, first_B: chex.Array) -> Rollout:
    """What the loop has left, behind its prompts. first_B: the column where each row begins."""
    P = prompt_QP.shape[1]
    G, T = len(first_B) // len(prompt_QP), P + state.tokens_BC.shape[1]
    routes_LBTX = state.routes_LBTX
    if routes_LBTX is not None:
        # The last token was never fed, and padding has no route.
        fed_BT = (jnp.arange(T) >= first_B[:, None]) & (jnp.arange(T) < (P + state.lengths_B - 1)[:, None])
        routes_LBTX = jnp.where(fed_BT[None, :, :, None], routes_LBTX, -1)
    return Rollout(
        tokens_BT=jnp.concatenate([jnp.repeat(prompt_QP, G, axis=0), state.tokens_BC], axis=1),
        prompt_lengths_B=jnp.repeat(prompt_lengths_Q, G),
        completion_lengths_B=state.lengths_B,
        logp_BC=state.logp_BC,
        routes_LBTX=routes_LBTX,
        truncated_B=~state.ended_B,
        decode_steps=state.step,
    )


def make_sampler(
    model: Transformer,
    *,
    num_generations: int,
    max_completion_length: int,
    eos_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
) -> Callable[[Params, chex.Array, chex.Array, chex.PRNGKey], Rollout]:
    """Returns jitted `sample(params, prompt_QP, prompt_lengths_Q, key) -> Rollout` with B = Q · num_generations rows.

    prompt_QP: int32, left-padded. Rows 0 .. G-1 of the result belong to prompt 0, and so on. A row ends with any of
    eos_ids (its log-prob counts) or after max_completion_length tokens; the rest of its frame is pad_id, and -1 in
    routes. Tokens are drawn from the distribution that `sampling` cuts, log-probs are those of the uncut softmax. Token
    i of row b is drawn with fold_in(fold_in(key, b), i). Compiled once per prompt width P. On a mesh
    (`model.layout`) rows are cut as the layout says."""
    spec, C, G = model.spec, max_completion_length, num_generations
    on_mesh = model.layout.constrain_fields

    def forward(params, key, step, method, *args):
        """The model, with a stream of router noise of its own at every step where a mismatch is injected."""
        rngs = {"router": jax.random.fold_in(jax.random.fold_in(key, C), step)} if model.injects else None
        return model.apply({"params": params}, *args, method=method, rngs=rngs)

    def next_token(params, key_B, hidden_BD, step):
        """One token per row, and its log-prob as the learner takes it: with the temperature, without the cuts."""
        logits_BV = model.apply({"params": params}, hidden_BD, method="logits")
        return jax.vmap(lambda key, logits_V: draw(jax.random.fold_in(key, step), logits_V, sampling))(key_B, logits_BV)

    def sample(params, prompt_QP, prompt_lengths_Q, key) -> Rollout:
        Q, P = prompt_QP.shape
        B = Q * G
        chex.assert_shape(prompt_lengths_Q, (Q,))
        widths = cache_widths(C)

        # Prefill: one pass over the prompts. Their keys and values serve all completions.
        first_Q = P - prompt_lengths_Q
        out, caches = forward(params, key, 0, "prefill", prompt_QP, first_Q, G, widths[0])
        first_B = jnp.repeat(first_Q, G)
        state = on_mesh(empty_state(spec, out, caches, B, C, pad_id))
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
        last_BD = jnp.repeat(out.hidden_BTD[:, -1], G, axis=0)
        state = append(state, *next_token(params, key_B, last_BD, state.step), eos_ids, pad_id)

        # Decode: feed the last token, draw the next.
        layers = None if spec.scanned else layers_of(params["blocks"], spec.num_layers)  # cut once, not for each token
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
            drawn = next_token(params, key_B, out.hidden_BTD[:, 0], state.step)
            return on_mesh(append(state, *drawn, eos_ids, pad_id))

        for width in widths:
            state = state.replace(caches=tuple(cache.widened(width) for cache in state.caches))
            last = min(width + 1, C)  # tokens drawn when the cache is full
            state = jax.lax.while_loop(lambda s, last=last: (s.step < last) & ~jnp.all(s.ended_B), body, state)

        return on_mesh(rollout_of(state, prompt_QP, prompt_lengths_Q, first_B))

    return jax.jit(jax.named_scope("rollout")(sample))


def cache_widths(max_completion_length: int) -> list[int]:
    """Columns of the cache, stretch by stretch of a rollout: attention reads what there is, so a long completion starts
    with a short cache. Each stretch is compiled, so they double."""
    widths = [min(FIRST_WIDTH, max_completion_length)]
    while widths[-1] < max_completion_length:
        widths.append(min(2 * widths[-1], max_completion_length))
    return widths
