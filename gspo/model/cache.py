"""The key/value cache of decoding: a pytree that goes in and comes out.

A prompt's keys and values are kept once for all completions of its group. Both lie as the products read them, keys as
[H, S] and values as [S, H]: nothing is transposed per layer and token.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp

from gspo.model.attention import MASKED
from gspo.types import array


@flax.struct.dataclass
class KVCache:
    """Keys and values of L layers: of the prompts, P columns each, and of the completions, C columns each. L is the
    number of layers where these are scanned, and 1 where each layer has a cache of its own."""

    prompt_k_LQKHP: chex.Array = array("LQKHP")
    prompt_v_LQKPH: chex.Array = array("LQKPH")
    k_LBKHC: chex.Array = array("LBKHC")
    v_LBKCH: chex.Array = array("LBKCH")

    @staticmethod
    def behind(k_LQPKH: chex.Array, v_LQPKH: chex.Array, completions: int, width: int) -> "KVCache":
        """The keys and values of prompts, with room for so many completions to each, of so many columns."""
        L, Q, _, K, H = k_LQPKH.shape
        return KVCache(
            jnp.transpose(k_LQPKH, (0, 1, 3, 4, 2)),
            jnp.transpose(v_LQPKH, (0, 1, 3, 2, 4)),
            jnp.zeros((L, Q * completions, K, H, width), k_LQPKH.dtype),
            jnp.zeros((L, Q * completions, K, width, H), v_LQPKH.dtype),
        )

    @property
    def width(self) -> int:
        return self.k_LBKHC.shape[-1]

    def widened(self, width: int) -> "KVCache":
        """Room for `width` columns of completions."""
        more = width - self.width
        return self.replace(
            k_LBKHC=jnp.pad(self.k_LBKHC, ((0, 0),) * 4 + ((0, more),)),
            v_LBKCH=jnp.pad(self.v_LBKCH, ((0, 0),) * 3 + ((0, more), (0, 0))),
        )

    def write(self, layer: chex.Array | int, column: chex.Array, k_BKH: chex.Array, v_BKH: chex.Array) -> "KVCache":
        """Puts one layer's keys and values at one column of every completion."""
        put = jax.lax.dynamic_update_slice
        return self.replace(
            k_LBKHC=put(self.k_LBKHC, k_BKH[None, :, :, :, None], (layer, 0, 0, 0, column)),
            v_LBKCH=put(self.v_LBKCH, v_BKH[None, :, :, None, :], (layer, 0, 0, column, 0)),
        )

    def read(self, layer: chex.Array | int) -> tuple[chex.Array, ...]:
        """One layer's (prompt_k_QKHP, prompt_v_QKPH, k_BKHC, v_BKCH)."""
        arrays = (self.prompt_k_LQKHP, self.prompt_v_LQKPH, self.k_LBKHC, self.v_LBKCH)
        return tuple(jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in arrays)


def attend_cached(
    q_BNH: chex.Array, cache: KVCache, layer: chex.Array | int, seen_QP: chex.Array, seen_BC: chex.Array
) -> chex.Array:
    """One query per row: softmax over its prompt's and its own cached columns that it sees. Returns [B, N, H].

    seen_QP bool: real columns of the prompts; seen_BC bool, [1, C] where all rows see the same."""
    prompt_k_QKHP, prompt_v_QKPH, k_BKHC, v_BKCH = cache.read(layer)
    (B, N, H), (Q, K, _, _) = q_BNH.shape, prompt_k_QKHP.shape
    G, R = B // Q, N // K
    q_BKRH = q_BNH.reshape(B, K, R, H) * H**-0.5

    def by_group(x_BKRA):  # one product for all rows of a prompt
        A = x_BKRA.shape[-1]
        return jnp.swapaxes(x_BKRA.reshape(Q, G, K, R, A), 1, 2).reshape(Q, K, G * R, A)

    def by_row(x_QKMA):
        A = x_QKMA.shape[-1]
        return jnp.swapaxes(x_QKMA.reshape(Q, K, G, R, A), 1, 2).reshape(B, K, R, A)

    to_prompt_QKMP = jnp.matmul(by_group(q_BKRH), prompt_k_QKHP, preferred_element_type=jnp.float32)
    to_prompt_BKRP = by_row(jnp.where(seen_QP[:, None, None], to_prompt_QKMP, MASKED))
    to_own_BKRC = jnp.matmul(q_BKRH, k_BKHC, preferred_element_type=jnp.float32)
    to_own_BKRC = jnp.where(seen_BC[:, None, None], to_own_BKRC, MASKED)
    most_BKR1 = jnp.maximum(jnp.max(to_prompt_BKRP, -1, keepdims=True), jnp.max(to_own_BKRC, -1, keepdims=True))
    prompt_BKRP, own_BKRC = jnp.exp(to_prompt_BKRP - most_BKR1), jnp.exp(to_own_BKRC - most_BKR1)
    total_BKR1 = jnp.sum(prompt_BKRP, -1, keepdims=True) + jnp.sum(own_BKRC, -1, keepdims=True)
    dtype = v_BKCH.dtype
    out_BKRH = jnp.matmul((own_BKRC / total_BKR1).astype(dtype), v_BKCH, preferred_element_type=jnp.float32)
    prompt_QKMP = by_group((prompt_BKRP / total_BKR1).astype(dtype))
    out_BKRH += by_row(jnp.matmul(prompt_QKMP, prompt_v_QKPH, preferred_element_type=jnp.float32))
    return out_BKRH.astype(dtype).reshape(B, N, H)
