"""Columns of a frame in chunks, for what would not fit in memory all at once."""

import chex
import jax.numpy as jnp


def cut_columns(x: chex.Array, chunk: int, fill: float = 0) -> chex.Array:
    """[B, T, ...] -> [parts, B, chunk, ...], contiguous chunks of columns; the last is filled up."""
    parts = -(-x.shape[1] // chunk)
    x = jnp.pad(x, ((0, 0), (0, parts * chunk - x.shape[1])) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], parts, chunk, *x.shape[2:]), 1, 0)


def join_columns(x: chex.Array, width: int) -> chex.Array:
    """Inverse of `cut_columns`, without what filled the last chunk up."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :width]
