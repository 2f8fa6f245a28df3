"""Masked sums and means, kept as (sum, count) until the very end.

A mean of means is wrong as soon as parts differ in size: micro-batches with different lengths, devices with different
rows. So nothing here divides; `Mean.value` does, once, after the parts were added.
"""

import chex
import flax.struct
import jax.numpy as jnp


@flax.struct.dataclass
class Mean:
    """A mean in the making: scalars `total` and `count`, float32 or wider. `a + b` merges two parts exactly."""

    total: chex.Array
    count: chex.Array

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> chex.Array:
        """total / count, and 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1)


def wide(x: chex.Array) -> chex.Array:
    """x as float32; float64 stays. A bf16 sum over thousands of tokens would be noise."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def masked_sum(x: chex.Array, mask: chex.Array, axis: int | tuple[int, ...] | None = None) -> chex.Array:
    """Sum of x where mask holds. x may hold inf or NaN elsewhere: it is replaced, not multiplied by 0."""
    return jnp.sum(jnp.where(mask, x, 0), axis=axis)


def masked_mean(x: chex.Array, mask: chex.Array) -> Mean:
    """Mean of x over the True elements of mask (broadcast to x), as a `Mean`."""
    x = wide(x)
    return Mean(masked_sum(x, mask), jnp.sum(jnp.broadcast_to(mask, x.shape), dtype=x.dtype))


def row_means(x_BC: chex.Array, mask_BC: chex.Array) -> chex.Array:
    """[B, C] -> [B] mean of each row over its mask; 0 for a row without a True element."""
    chex.assert_equal_shape([x_BC, mask_BC])
    return masked_sum(wide(x_BC), mask_BC, axis=1) / jnp.maximum(jnp.sum(mask_BC, axis=1), 1)
