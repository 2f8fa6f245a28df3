"""RMSNorm and grouped-query attention.

What differs between whole frames, packed groups and decoding is how queries find their keys: `Attention` is given a
function for it, a `Mix`.
"""

from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from gspo.model.columns import cut_columns, join_columns
from gspo.model.rope import apply_rope
from gspo.parallel.sharding import ONE_DEVICE, Layout

MASKED = -1e30  # finite, so that a row with nothing to attend to gives a mean and not NaN

# (q_BTNH, k_BTKH, v_BTKH) -> (mixed_BTNH, whatever is to be kept of this layer)
Mix = Callable[[chex.Array, chex.Array, chex.Array], tuple[chex.Array, Any]]

kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, computed in float32 (Zhang & Sennrich 2019)."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.with_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype)


class Bias(nn.Module):
    """A vector that starts at zero, float32, under the name "bias", to which no weight decay applies. axis: its logical
    name."""

    axis: str

    @nn.compact
    def __call__(self, width: int):
        return self.param("bias", nn.with_partitioning(nn.initializers.zeros, (self.axis,)), (width,), jnp.float32)


def visible(first_B: chex.Array, start: chex.Array | int, queries: int, keys: int) -> chex.Array:
    """[B, T, S] bool: key column s is seen from query column t iff first <= s <= t. Padding before `first` sees itself
    only."""
    query_T = start + jnp.arange(queries)
    key_S = jnp.arange(keys)
    seen_BTS = (key_S >= first_B[:, None, None]) & (key_S <= query_T[None, :, None])
    return seen_BTS | (key_S == query_T[:, None])[None]


def within(segments_BT: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Rows that hold several sequences, one behind the other, numbered by column: (positions [B, T] int32 in their own
    sequence, [B, T, S] bool whether two columns are of one sequence)."""
    column_T = jnp.arange(segments_BT.shape[1])
    begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    first_BT = jax.lax.cummax(jnp.where(begins_BT, column_T, 0), axis=1)
    return column_T - first_BT, segments_BT[:, :, None] == segments_BT[:, None, :]


def attend(
    q_BTNH: chex.Array, k_BSKH: chex.Array, v_BSKH: chex.Array, visible_BTS: chex.Array, chunk: int = 0
) -> chex.Array:
    """softmax(q·k/√H) v with N/K query heads to each key/value head; scores and softmax in float32. Returns [B, T, N,
    H].

    chunk: query columns whose scores exist at a time, forward and backward (remat); 0: all T.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    chex.assert_shape(visible_BTS, (B, T, k_BSKH.shape[1]))
    if 0 < chunk < T:
        piece = jax.checkpoint(lambda q_and_visible: attend(q_and_visible[0], k_BSKH, v_BSKH, q_and_visible[1]))
        out = jax.lax.map(piece, (cut_columns(q_BTNH, chunk), cut_columns(visible_BTS, chunk, fill=True)))
        return join_columns(out, T)
    q_BTKRH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    score_BKRTS = jnp.einsum("BTKRH,BSKH->BKRTS", q_BTKRH, k_BSKH, preferred_element_type=jnp.float32)
    score_BKRTS = jnp.where(visible_BTS[:, None, None], score_BKRTS, MASKED)
    weight_BKRTS = jax.nn.softmax(score_BKRTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKRTS,BSKH->BTKRH", weight_BKRTS, v_BSKH).reshape(B, T, N, H)


class Attention(nn.Module):
    """Grouped-query attention with optional RMSNorm on queries and keys before RoPE: over each head (Qwen3), or over
    the whole projection, all heads together (OLMoE). Optional biases: on queries, keys and values (Qwen2), and on the
    output.
    """

    num_heads: int
    num_kv_heads: int
    head_width: int
    qk_norm: bool
    rms_eps: float
    dtype: jnp.dtype
    qk_norm_over: str = "head"
    layout: Layout = ONE_DEVICE
    qkv_bias: bool = False
    out_bias: bool = False

    def _project(self, name: str, x_BTD, heads: int, axis: str):
        kernel_init_ = nn.with_partitioning(kernel_init, ("embed", axis))
        kernel = self.param(name, kernel_init_, (x_BTD.shape[-1], heads * self.head_width), jnp.float32).astype(
            self.dtype
        )
        y = x_BTD @ self.layout.gathered(kernel, "embed", axis)
        if self.qkv_bias:
            y += Bias(axis, name=f"{name}_bias")(y.shape[-1]).astype(self.dtype)
        return self.layout.constrain(y.reshape(*y.shape[:2], heads, self.head_width), "rows", None, axis, None)

    def _norm(self, name: str, x_BTNH):
        norm = RMSNorm(self.rms_eps, name=name)
        if self.qk_norm_over == "projection":
            return norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)
        return norm(x_BTNH)

    @nn.compact
    def __call__(self, x_BTD: chex.Array, rope: tuple[chex.Array, chex.Array], mix: Mix) -> tuple[chex.Array, Any]:
        """Returns (out_BTD, what mix keeps)."""
        q_BTNH = self._project("query", x_BTD, self.num_heads, "heads")
        k_BTKH = self._project("key", x_BTD, self.num_kv_heads, "kv_heads")
        v_BTKH = self._project("value", x_BTD, self.num_kv_heads, "kv_heads")
        if self.qk_norm:
            q_BTNH = self._norm("query_norm", q_BTNH)
            k_BTKH = self._norm("key_norm", k_BTKH)
        mixed_BTNH, kept = mix(apply_rope(q_BTNH, *rope), apply_rope(k_BTKH, *rope), v_BTKH)
        kernel_init_ = nn.with_partitioning(kernel_init, ("heads", "embed"))
        shape = (self.num_heads * self.head_width, x_BTD.shape[-1])
        kernel = self.param("out", kernel_init_, shape, jnp.float32).astype(self.dtype)
        out_BTD = mixed_BTNH.reshape(*x_BTD.shape[:2], -1) @ self.layout.gathered(kernel, "heads", "embed")
        if self.out_bias:
            out_BTD += Bias("norm", name="out_bias")(shape[1]).astype(self.dtype)
        return out_BTD, kept
