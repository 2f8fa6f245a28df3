"""What decoding writes, whichever loop does it: `gspo.learning.sampler` all rows at once, `gspo.learning.refill` some
at a time."""

import dataclasses

import chex
import flax.struct
import jax
import jax.numpy as jnp

from gspo.model.cache import Caches
from gspo.model.distribution import Sampling, draw
from gspo.model.routing import route_dtype
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Output, Transformer
from gspo.types import Params, Rollout, array

FIRST_WIDTH = 128  # columns that the cache of completions starts with


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How completions are drawn, as `make_sampler` takes it."""

    model: Transformer
    num_generations: int
    max_completion_length: int
    eos_ids: tuple[int, ...]
    pad_id: int
    sampling: Sampling

    def next_token(
        self, params: Params, key_B: chex.PRNGKey, hidden_BD: chex.Array, step: chex.Array
    ) -> tuple[chex.Array, chex.Array]:
        """One token per row, and its log-prob as the learner takes it: with the temperature, without the cuts. step:
        how many tokens the rows have, [B] or the same for all."""
        logits_BV = self.model.apply({"params": params}, hidden_BD, method="logits")
        keys_B = jax.vmap(jax.random.fold_in)(key_B, jnp.broadcast_to(step, len(key_B)))
        return jax.vmap(lambda key, logits_V: draw(key, logits_V, self.sampling))(keys_B, logits_BV)

    def is_end(self, token_B: chex.Array) -> chex.Array:
        return jnp.any(token_B[:, None] == jnp.asarray(self.eos_ids, jnp.int32), axis=1)


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


def append(how: Decoding, state: DecodeState, token_B: chex.Array, logp_B: chex.Array) -> DecodeState:
    """Writes one token to every row that has not ended; pads the others."""
    live_B = ~state.ended_B
    at = (0, state.step)
    return state.replace(
        step=state.step + 1,
        tokens_BC=jax.lax.dynamic_update_slice(state.tokens_BC, jnp.where(live_B, token_B, how.pad_id)[:, None], at),
        logp_BC=jax.lax.dynamic_update_slice(state.logp_BC, jnp.where(live_B, logp_B, 0.0)[:, None], at),
        lengths_B=state.lengths_B + live_B,
        ended_B=state.ended_B | how.is_end(token_B),
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


def cache_widths(max_completion_length: int) -> list[int]:
    """Columns of the cache, stretch by stretch of a rollout: attention reads what there is, so a long completion starts
    with a short cache. Each stretch is compiled, so they double."""
    widths = [min(FIRST_WIDTH, max_completion_length)]
    while widths[-1] < max_completion_length:
        widths.append(min(2 * widths[-1], max_completion_length))
    return widths
