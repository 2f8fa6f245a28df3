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
    """Keys and values of one layer: of the prompts, P columns each, and of their completions, C columns each."""

    prompt_k_QKHP: chex.Array = array("QKHP")
    prompt_v_QKPH: chex.Array = array("QKPH")
    k_BKHC: chex.Array = array("BKHC")
    v_BKCH: chex.Array = array("BKCH")

    @staticmethod
    def behind(k_QPKH: chex.Array, v_QPKH: chex.Array, completions: int, width: int) -> "KVCache":
        """The keys and values of prompts, with room for so many completions to each, of so many columns."""
        Q, _, K, H = k_QPKH.shape
        return KVCache(
            jnp.transpose(k_QPKH, (0, 2, 3, 1)),
            jnp.transpose(v_QPKH, (0, 2, 1, 3)),
            jnp.zeros((Q * completions, K, H, width), k_QPKH.dtype),
            jnp.zeros((Q * completions, K, width, H), v_QPKH.dtype),
        )

    @property
    def width(self) -> int:
        return self.k_BKHC.shape[-1]

    def widened(self, width: int) -> "KVCache":
        """Room for `width` columns of completions."""
        return self.replace(k_BKHC=_longer(self.k_BKHC, width, 3), v_BKCH=_longer(self.v_BKCH, width, 2))

    def write(self, layer: chex.Array | int, column: chex.Array, k_BKH: chex.Array, v_BKH: chex.Array) -> "KVCache":
        """Puts keys and values at one column of every completion. layer: there is but one."""
        put = jax.lax.dynamic_update_slice
        return self.replace(
            k_BKHC=put(self.k_BKHC, k_BKH[:, :, :, None], (0, 0, 0, column)),
            v_BKCH=put(self.v_BKCH, v_BKH[:, :, None, :], (0, 0, column, 0)),
        )

    def read(self, layer: chex.Array | int) -> "KVCache":
        return self


@flax.struct.dataclass
class StackedCache:
    """The caches of all layers, for layers that run as a loop."""

    prompt_k_LQKHP: chex.Array = array("LQKHP")
    prompt_v_LQKPH: chex.Array = array("LQKPH")
    k_LBKHC: chex.Array = array("LBKHC")
    v_LBKCH: chex.Array = array("LBKCH")

    @staticmethod
    def behind(k_LQPKH: chex.Array, v_LQPKH: chex.Array, completions: int, width: int) -> "StackedCache":
        layers = jax.vmap(lambda k_QPKH, v_QPKH: KVCache.behind(k_QPKH, v_QPKH, completions, width))(k_LQPKH, v_LQPKH)
        return StackedCache(*jax.tree.leaves(layers))

    @property
    def width(self) -> int:
        return self.k_LBKHC.shape[-1]

    def widened(self, width: int) -> "StackedCache":
        """Room for `width` columns of completions."""
        return self.replace(k_LBKHC=_longer(self.k_LBKHC, width, 4), v_LBKCH=_longer(self.v_LBKCH, width, 3))

    def write(self, layer: chex.Array, column: chex.Array, k_BKH: chex.Array, v_BKH: chex.Array) -> "StackedCache":
        """Puts one layer's keys and values at one column of every completion."""
        put = jax.lax.dynamic_update_slice
        return self.replace(
            k_LBKHC=put(self.k_LBKHC, k_BKH[None, :, :, :, None], (layer, 0, 0, 0, column)),
            v_LBKCH=put(self.v_LBKCH, v_BKH[None, :, :, None, :], (layer, 0, 0, column, 0)),
        )

    def read(self, layer: chex.Array) -> KVCache:
        """That of one layer."""
        arrays = (self.prompt_k_LQKHP, self.prompt_v_LQKPH, self.k_LBKHC, self.v_LBKCH)
        return KVCache(*(jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in arrays))


Caches = tuple[KVCache, ...] | tuple[StackedCache]  # one for each layer, or one for all


def _longer(x: chex.Array, width: int, axis: int) -> chex.Array:
    return jnp.pad(x, [(0, (width - x.shape[axis]) * (i == axis)) for i in range(x.ndim)])


def attend_cached(q_BNH: chex.Array, cache: KVCache, seen_QP: chex.Array, seen_BC: chex.Array) -> chex.Array:
    """One query per row: softmax over its prompt's and its own cached columns that it sees. Returns [B, N, H].

    seen_QP bool: real columns of the prompts; seen_BC bool, [1, C] where all rows see the same."""
    (B, N, H), (Q, K, _, _) = q_BNH.shape, cache.prompt_k_QKHP.shape
    G, R = B // Q, N // K
    q_BKRH = q_BNH.reshape(B, K, R, H) * H**-0.5

    def by_group(x_BKRA):  # one product for all rows of a prompt
        A = x_BKRA.shape[-1]
        return jnp.swapaxes(x_BKRA.reshape(Q, G, K, R, A), 1, 2).reshape(Q, K, G * R, A)

    def by_row(x_QKMA):
        A = x_QKMA.shape[-1]
        return jnp.swapaxes(x_QKMA.reshape(Q, K, G, R, A), 1, 2).reshape(B, K, R, A)

    to_prompt_QKMP = jnp.matmul(by_group(q_BKRH), cache.prompt_k_QKHP, preferred_element_type=jnp.float32)
    to_prompt_BKRP = by_row(jnp.where(seen_QP[:, None, None], to_prompt_QKMP, MASKED))
    to_own_BKRC = jnp.matmul(q_BKRH, cache.k_BKHC, preferred_element_type=jnp.float32)
    to_own_BKRC = jnp.where(seen_BC[:, None, None], to_own_BKRC, MASKED)
    most_BKR1 = jnp.maximum(jnp.max(to_prompt_BKRP, -1, keepdims=True), jnp.max(to_own_BKRC, -1, keepdims=True))
    prompt_BKRP, own_BKRC = jnp.exp(to_prompt_BKRP - most_BKR1), jnp.exp(to_own_BKRC - most_BKR1)
    total_BKR1 = jnp.sum(prompt_BKRP, -1, keepdims=True) + jnp.sum(own_BKRC, -1, keepdims=True)
    dtype = cache.v_BKCH.dtype
    out_BKRH = jnp.matmul((own_BKRC / total_BKR1).astype(dtype), cache.v_BKCH, preferred_element_type=jnp.float32)
    prompt_QKMP = by_group((prompt_BKRP / total_BKR1).astype(dtype))
    out_BKRH += by_row(jnp.matmul(prompt_QKMP, cache.prompt_v_QKPH, preferred_element_type=jnp.float32))
    return out_BKRH.astype(dtype).reshape(B, N, H)
